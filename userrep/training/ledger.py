"""The ledger of a run: one line of JSON per optimizer step, by which anybody can check what was trained on."""

import json
import os
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
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

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
        text = json.dumps({**line, "time_ms": time_ms, "loss": loss}) + "\n"
        size = os.fstat(self._file).st_size
        is_torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"  # by a kill or a full disk
        os.write(self._file, (("\n" if is_torn else "") + text).encode())

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


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
