"""The erasure log: what was rewritten, when and for whom, without an id in it.

A user is the HMAC-SHA-256 of the id under a key that lies beside the log and that only its owner can read. Who holds
both can tell whether an id that is asked about was erased; the log alone tells nothing, also where ids can be guessed.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

KEY_BYTES = 32
KEY_MODE = 0o600


class ErasureLog:
    """`log.jsonl` and `key` in a directory."""

    def __init__(self, directory: Path, ids: Sequence[str]) -> None:
        """Opens the log, with a new key where there is none.

        Args:
            directory: where log and key lie; made if missing.
            ids: of the users that are erased; a record is of all of them unless it says otherwise.

        Raises:
            ValueError: others than its owner can read the key, or it is no key.
        """
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._key = _read_key(self._directory / "key")
        self.pseudonyms = [self.pseudonym(one) for one in ids]

    @property
    def path(self) -> Path:
        """The log."""
        return self._directory / "log.jsonl"

    def pseudonym(self, user_id: str) -> str:
        """What stands for a user in the log, hex."""
        return hmac.new(self._key, user_id.encode(), hashlib.sha256).hexdigest()

    def append(self, event: str, users: Iterable[str] | None = None, **values: Any) -> None:
        """Adds a line, which is on disk when this returns.

        Args:
            event: what happened.
            users: ids of those whom it concerns; None for all.
            values: more of it, JSON-plain.
        """
        pseudonyms = self.pseudonyms if users is None else [self.pseudonym(one) for one in users]
        record = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "users": pseudonyms}
        line = json.dumps({**record, **values}, sort_keys=True) + "\n"
        with self.path.open("a+b") as stream:
            if stream.tell() and _last_byte(stream) != b"\n":
                line = "\n" + line  # a killed process has left half a line
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuses a second erasure at the same time.

        Raises:
            ValueError: another process is at it.
        """
        with (self._directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another erasure is at work in {self._directory.parent}: wait for its end") from error
            yield


def read_log(path: Path) -> list[Mapping[str, Any]]:
    """The records of a log, the oldest first; a line that a killed process has not finished is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _read_key(path: Path) -> bytes:
    if not path.exists():
        temporary = path.with_name(f".key.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, KEY_MODE), "w") as stream:
            stream.write(secrets.token_hex(KEY_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others: `chmod 600 {path}`; who has it can look ids up in the log")
    try:
        key = bytes.fromhex(path.read_text())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"{path} is no key of {KEY_BYTES} bytes in hex: restore it; without it the log cannot be read")
    return key


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1)
