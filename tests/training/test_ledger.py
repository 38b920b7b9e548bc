"""The ledger: what it holds, and what it refuses."""

from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userrep.training.ledger import LEDGER_NAME, Ledger, ReplayMismatchError, append_line, read_ledger


def append(path: Path, attempt: int, steps: range, salt: str = "") -> None:
    with closing(Ledger(path, attempt, steps.start - 1)) as ledger:
        for step in steps:
            ledger.append(step, f"hash {step}{salt}", 8 * step, 1000 + step, 1 / step)


@given(stops=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 60)), max_size=5))
def test_attempts_follow_each_other_and_nothing_but_a_torn_line_is_lost(
    stops: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / LEDGER_NAME
    expected = []
    for attempt, (first, torn_bytes) in enumerate(stops, start=1):
        append(path, attempt, range(first, first + 3))
        expected += [(attempt, step) for step in range(first, first + 3)]
        size = path.stat().st_size
        last_line = len(path.read_bytes().splitlines()[-1])
        if torn_bytes:
            with path.open("r+b") as stream:
                stream.truncate(size - min(torn_bytes, last_line))
        if torn_bytes > 1:  # the first one is the newline
            expected.pop()
    lines = read_ledger(path)
    assert [(line["attempt"], line["step"]) for line in lines] == expected
    for line in lines:
        assert line["batch_hash"] == f"hash {line['step']}"
        assert line["samples_seen"] == 8 * line["step"]
        assert line["time_ms"] == 1000 + line["step"]
        assert line["loss"] == 1 / line["step"]


def test_a_step_with_other_samples_than_before_is_refused(tmp_path: Path) -> None:
    path = tmp_path / LEDGER_NAME
    append(path, 1, range(1, 6))
    append(path, 2, range(3, 6))
    with pytest.raises(ReplayMismatchError, match="step 4 was trained on other samples"):
        append(path, 3, range(4, 8), salt="!")
    assert len(read_ledger(path)) == 8


def test_no_ledger_is_an_empty_one(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / LEDGER_NAME) == []


class FullDisk:
    """Takes a few bytes of every write, as a disk that is nearly full does."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: bytes) -> int:
        return self._stream.write(text[:7])


def test_a_write_that_takes_a_part_goes_on(tmp_path: Path) -> None:
    with (tmp_path / LEDGER_NAME).open("ab+", buffering=0) as stream:
        for step in (1, 2):
            append_line(cast(Any, FullDisk(stream)), {"step": step, "what": "x" * 40})
    assert [line["step"] for line in read_ledger(tmp_path / LEDGER_NAME)] == [1, 2]
