"""The ledger of a run: one line of JSON per optimizer step, by which anybody can check what was trained on."""

import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

LEDGER_NAME = "ledger.jsonl"


class ReplayMismatchError(RuntimeError):
    """A step that was taken again had other samples than the first time."""


class Ledger:
    """Append-only; written by rank 0. Steps that a resumed run takes again stand there again, with the same hash."""

    def __init__(self, path: Path, attempt: int, start_step: int) -> None:
        """Args: attempt is the number that the lines carry, start_step the steps taken before it."""
        self.path, self._attempt = path, attempt
        self._known = {line["step"]: line["batch_hash"] for line in read_ledger(path) if line["step"] > start_step}
        self._stream = path.open("ab+", buffering=0)

    def append(self, step: int, batch_hash: str, samples_seen: int, time_ms: int, loss: float) -> None:
        """Adds a line.

        Args:
            step: optimizer steps taken, with this one.
            batch_hash: rolling hash of the users of all steps so far.
            samples_seen: samples of all steps so far.
            time_ms: unix time.
            loss: of the global batch.

        Raises:
            ReplayMismatchError: the step was in the ledger with another hash.
        """
        if (known := self._known.setdefault(step, batch_hash)) != batch_hash:
            raise ReplayMismatchError(
                f"step {step} was trained on other samples before: hash {batch_hash}, in {self.path} {known}. "
                "The shards or the code have changed under the run; start it anew in another working directory"
            )
        line = {"attempt": self._attempt, "step": step, "batch_hash": batch_hash, "samples_seen": samples_seen}
        append_line(self._stream, {**line, "time_ms": time_ms, "loss": loss})

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def append_line(stream: FileIO, values: dict[str, Any]) -> None:
    """Appends a line of JSON, whole.

    Args:
        stream: unbuffered, opened for appending and reading.
        values: of the line.

    Raises:
        OSError: the storage does not take it. It may be called again: what is there of the line is passed over.
    """
    text = (json.dumps(values) + "\n").encode()
    size = os.fstat(stream.fileno()).st_size
    if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
        text = b"\n" + text  # a kill or a full disk has torn the last line
    while text:
        text = text[stream.write(text) :]


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """All complete lines in the order of writing; one that a kill cut short is left out. Empty without a file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
