"""A log of a run in object storage: pieces, each an object that is named by attempt and offset.

Objects cannot be appended to. So the process that writes a log appends to a file of its own and uploads what is new
with every checkpoint; readers put the pieces together in the order of their names. The pieces of an attempt follow
those of the attempts before it, so a file that was put together is a part of the next one, and readers go on in it.
"""

import os
import time
from pathlib import Path

from userrep import objects
from userrep.mirror import object_name

PIECES = ".pieces"  # behind the name of the log


class LogPieces:
    """Uploads what an attempt appends to its own file of a log; does nothing where the file is in no mirror."""

    def __init__(self, path: Path, attempt: int) -> None:
        """Args: path of the file, which holds what was received and nothing else; attempt that appends."""
        self._path, self._attempt, self._name = path, attempt, object_name(path)
        self._start = path.stat().st_size if path.exists() else 0

    def send(self) -> None:
        """Returns when the store has everything.

        Raises:
            OSError: it does not take it; may be called again.
        """
        if self._name is None or not self._path.exists():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._start)
            content = stream.read()
        if content:
            send_piece(self._path, self._attempt, self._start, content)
            self._start += len(content)


def send_piece(path: Path, attempt: int, place: int, content: bytes) -> None:
    """Uploads a piece of a log; does nothing where the path is in no mirror.

    Args:
        path: of the log.
        attempt: that has written it.
        place: of the piece among those of the attempt.
        content: complete lines.
    """
    if (name := object_name(path)) is not None:
        objects.write_object(f"{name}{PIECES}/{attempt:06d}-{place:015d}", content)


_received: dict[Path, float] = {}


def receive_log(path: Path, max_age_s: float = 0.0) -> None:
    """Brings a log up to date, where its path is in a mirror; nobody else may write to the file.

    Args:
        path: of the log.
        max_age_s: what this process has received no longer ago is new enough.
    """
    now = time.monotonic()
    if (name := object_name(path)) is None or now - _received.get(path, -max_age_s - 1) < max_age_s:
        return
    pieces = sorted(objects.list_objects(f"{name}{PIECES}").items())
    if pieces:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            end, size = 0, os.fstat(stream.fileno()).st_size
            for piece, info in pieces:
                end += info.size
                if size < end:
                    content = objects.read_object(f"{name}{PIECES}/{piece}")
                    end += len(content) - info.size  # its attempt may have uploaded it again, with more lines
                    new = content[len(content) - (end - size) :]
                    stream.write(new)
                    size += len(new)
    _received[path] = now
