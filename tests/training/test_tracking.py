"""The spool: what a writer that is killed, or storage that fails, leaves to the readers."""

import json
import math
from pathlib import Path

import pytest

from userrep.training.tracking import MetricSpool, SpoolReader, read_points


def write(path: Path, *steps: int) -> None:
    spool = MetricSpool(path)
    for step in steps:
        spool.write(step, 1000 * step, {"loss": 1 / step})
    spool.close()


def steps_in(path: Path) -> list[int]:
    return [point["step"] for point, _ in read_points(path)]


def test_points_come_back_as_they_were_written(tmp_path: Path) -> None:
    spool = MetricSpool(tmp_path / "new" / "spool")
    written = {"a/b": 0.1 + 0.2, "nan": math.nan, "inf": -math.inf}
    spool.write(3, 1234, written)
    spool.close()
    (point,) = SpoolReader(tmp_path / "new" / "spool").read()
    assert point == {"step": 3, "time_ms": 1234, "metrics": pytest.approx(written, rel=0, nan_ok=True)}


def test_a_point_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    spool = MetricSpool(tmp_path / "spool")
    for step in range(1, 4):
        spool.write(step, 0, {"loss": 0.5})
        assert steps_in(tmp_path / "spool")[-1] == step  # a SIGKILL now takes nothing away
    spool.close()


def test_a_reader_gets_every_line_once_and_none_in_halves(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    reader = SpoolReader(path)
    assert reader.read() == []
    write(path, *range(1, 8))
    content = path.read_bytes()
    path.write_bytes(b"")
    read = []
    for byte in content:
        with path.open("ab") as stream:
            stream.write(bytes([byte]))
        read += reader.read()
    assert [point["step"] for point in read] == list(range(1, 8))


def test_a_line_that_is_completed_while_it_is_read_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spool"
    write(path, 1, 2, 3, 4)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 5 // 8])  # the writer is in the middle of step 3
    parse = json.loads

    def parse_while_the_writer_goes_on(line: bytes) -> dict:
        if not line.endswith(b"\n"):
            path.write_bytes(content)
        return parse(line)

    monkeypatch.setattr(json, "loads", parse_while_the_writer_goes_on)
    reader = SpoolReader(path)
    points = reader.read()
    path.write_bytes(content)
    assert [point["step"] for point in points + reader.read()] == [1, 2, 3, 4]


def test_what_a_killed_writer_left_of_a_line_spoils_no_other(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write(whole, 1, 2)
    content = whole.read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path = tmp_path / str(size)
        path.write_bytes(content[:size])
        write(path, 9)
        assert steps_in(path) == [*range(1, 1 + sum(size >= end for end in ends)), 9]


def test_a_line_that_the_disk_has_damaged_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    write(path, 1, 2, 3)
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0" * (len(second) - 1) + b"\n" + third)
    assert steps_in(path) == [1, 3]


class FailingFile:
    """Takes so many bytes and then, as a full or a read-only disk, nothing."""

    def __init__(self, stream, room: int) -> None:
        self.stream, self.room = stream, room

    def write(self, content: bytes) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        size = self.stream.write(content[: self.room])
        self.room -= size
        return size

    def fileno(self) -> int:
        return self.stream.fileno()

    def close(self) -> None:
        self.stream.close()


@pytest.mark.parametrize("room", [0, 1, 70, 100])
def test_a_write_that_storage_refused_can_be_repeated(tmp_path: Path, room: int) -> None:
    spool = MetricSpool(tmp_path / "spool")
    real = spool._stream
    spool._stream = FailingFile(real, room)
    for step in range(1, 5):
        try:
            spool.write(step, 0, {"loss": 0.25})
        except OSError:
            spool._stream = real
            spool.write(step, 0, {"loss": 0.25})
    spool.close()
    assert spool._stream is real
    assert steps_in(tmp_path / "spool") == [1, 2, 3, 4]
