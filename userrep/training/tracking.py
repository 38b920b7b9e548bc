"""Metrics of a run: a local spool that training writes and that others read. Training knows nothing of MLflow.

What a crash may lose: a killed process loses no point, because `write` hands it to the kernel before it returns. A
machine that loses its power loses what came after the last fsync. The loop makes one before it commits a checkpoint, so
a resumed run takes exactly the steps again whose points are lost.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from userrep.training.ledger import append_line

SPOOL_NAME = "metrics.jsonl"  # in the run directory


class MetricSpool:
    """Append-only JSON lines of metrics, written by rank 0."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab+", buffering=0)

    def write(self, step: int, time_ms: int, metrics: dict[str, float]) -> None:
        """Appends the point of a step.

        Args:
            step: optimizer steps taken.
            time_ms: unix milliseconds.
            metrics: values by name; NaN and infinite ones are kept.

        Raises:
            OSError: the storage does not take it. It may be called again: a point that stands twice counts once.
        """
        append_line(self._stream, {"step": step, "time_ms": time_ms, "metrics": metrics})

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class SpoolReader:
    """Yields the complete lines that were appended since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """New points, oldest first; a half-written last line is left for the next call."""
        points = []
        for point, offset in read_points(self._path, self._offset):
            points.append(point)
            self._offset = offset
        return points


def read_points(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Reads complete lines of a spool, one at a time; torn or damaged ones are passed over.

    Args:
        path: of the spool; none is an empty one.
        offset: in bytes, where a line begins.

    Yields:
        A point, and the offset behind its line.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return  # its rest may come any moment, and would be taken for a line
            offset += len(line)
            try:
                point = json.loads(line)
            except ValueError:
                continue
            yield point, offset
