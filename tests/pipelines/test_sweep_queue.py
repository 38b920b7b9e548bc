"""What lanes are given, and what is left of a unit whose worker is lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.sweep_lanes import count_lanes
from pipelines.sweep_queue import FAILURE_NAME, JOURNAL_NAME, STATUS_NAME, CellQueue, Priced
from userrep.config import ConfigError


class Clock:
    """Time that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def priced(name: str, seconds: float, num_cells: int = 1) -> Priced:
    cells = [{"cell_id": f"{name}{number}"} for number in range(num_cells)]
    return Priced({"trunk_id": name, "label": f"N {name}", "cells": cells, "timeout_s": 900}, seconds)


def events(directory: Path) -> list[tuple[str, Any]]:
    lines = map(json.loads, (directory / JOURNAL_NAME).read_text().splitlines())
    return [(line["event"], line.get("cell_id") or line["trunk_id"]) for line in lines]


def test_the_most_expensive_unit_comes_first(tmp_path: Path):
    queue = CellQueue(tmp_path, [priced("a", 10), priced("b", 30), priced("c", 20)], retries=0)
    taken = []
    while (unit := queue.claim(0)) is not None:
        taken.append(unit["trunk_id"])
        queue.finished(0, f"{unit['trunk_id']}0")
        queue.done(0)
    assert taken == ["b", "c", "a"]
    assert queue.status()["finished"] == 3
    assert json.loads((tmp_path / STATUS_NAME).read_text())["waiting"] == 0


def test_a_unit_that_would_not_end_in_time_gives_way_to_a_cheaper_one(tmp_path: Path):
    clock = Clock()
    queue = CellQueue(tmp_path, [priced("a", 10), priced("b", 100, 2)], retries=0, max_seconds=50, clock=clock)
    unit = queue.claim(0)
    assert unit is not None
    assert unit["trunk_id"] == "a"
    clock.now += 10
    queue.finished(0, "a0")
    queue.done(0)
    assert queue.claim(0) is None
    assert queue.status()["passed_over"] == ["b0", "b1"]


def test_prices_follow_what_units_have_taken(tmp_path: Path):
    clock = Clock()
    units = [priced("a", 100), priced("b", 40), priced("c", 39)]
    queue = CellQueue(tmp_path, units, retries=0, max_seconds=400, clock=clock)
    queue.claim(0)
    clock.now += 300  # three times its price
    queue.done(0)
    assert queue.status()["left_s"] == pytest.approx(3 * (40 + 39))
    assert queue.claim(0) is None, "two units that now take 120 and 117 s, with 100 s left"
    assert queue.status()["passed_over"] == ["b0", "c0"]


def test_time_left_is_that_of_the_lane_that_ends_last(tmp_path: Path):
    clock = Clock()
    queue = CellQueue(tmp_path, [priced("a", 100), priced("b", 60), priced("c", 30)], retries=0, clock=clock)
    queue.claim(0), queue.claim(1)
    clock.now += 20
    assert queue.status()["left_s"] == pytest.approx(80)  # lane 0; lane 1 has 40 + 30
    queue.beat(1, 5, 9, "loss 1.000")
    assert queue.status()["lanes"][1] | {"seconds": 0} == {
        "trunk_id": "b",
        "label": "N b",
        "step": 5,
        "num_steps": 9,
        "note": "loss 1.000",
        "seconds": 0,
        "expected_s": 60,
    }


def test_what_a_lost_worker_had_not_finished_is_tried_again(tmp_path: Path):
    queue = CellQueue(tmp_path, [priced("a", 10, 3), priced("b", 1)], retries=1)
    queue.claim(0)
    queue.finished(0, "a0")
    again = queue.claim(0)
    assert again is not None
    assert [cell["cell_id"] for cell in again["cells"]] == ["a1", "a2"]
    queue.finished(0, "a1")
    queue.explain(0, "rank 0: OSError: no space")
    after = queue.claim(0)  # lost a second time: its last cell has failed, and others go on
    assert after is not None
    assert after["trunk_id"] == "b"
    failure = json.loads((tmp_path / "cells" / "a2" / FAILURE_NAME).read_text())
    assert failure["message"] == "its worker was lost 2 times: rank 0: OSError: no space"
    assert failure["is_final"] is False
    assert not (tmp_path / "cells" / "a1").exists()
    status = queue.status()
    assert (status["failed"], status["finished"], status["waiting"]) == (1, 2, 0)
    assert events(tmp_path) == [
        ("start", "a"),
        ("finish", "a0"),
        ("lost", "a"),
        ("start", "a"),
        ("finish", "a1"),
        ("lost", "a"),
        ("fail", "a2"),
        ("start", "b"),
    ]


def test_a_unit_that_diverges_fails_alone(tmp_path: Path):
    queue = CellQueue(tmp_path, [priced("a", 10, 2), priced("b", 1)], retries=5)
    queue.claim(0)
    queue.finished(0, "a0")
    queue.failed(0, "diverged: at step 3", is_final=True)
    after = queue.claim(0)
    assert after is not None
    assert after["trunk_id"] == "b"
    assert json.loads((tmp_path / "cells" / "a1" / FAILURE_NAME).read_text()) == {
        "message": "diverged: at step 3",
        "is_final": True,
    }


def test_lanes_are_as_many_as_there_is_room_for():
    assert count_lanes(0, cpus=8, gpus=0, num_workers=2, threads=1, use_gpu=False) == 4
    assert count_lanes(3, cpus=8, gpus=0, num_workers=2, threads=1, use_gpu=False) == 3
    assert count_lanes(0, cpus=64, gpus=8, num_workers=2, threads=4, use_gpu=True) == 4
    with pytest.raises(ConfigError, match=r"a lane of 4 workers .* does not fit into the cluster's 2 CPUs"):
        count_lanes(0, cpus=2, gpus=0, num_workers=4, threads=1, use_gpu=False)


def test_the_share_that_is_done_counts_by_price(tmp_path: Path):
    clock = Clock()
    queue = CellQueue(tmp_path, [priced("a", 60), priced("b", 40)], retries=0, clock=clock)
    assert queue.status()["share"] == 0
    queue.claim(0)
    clock.now += 30
    assert queue.status()["share"] == pytest.approx(0.3)
    clock.now += 90  # twice as long as it was priced; no more than its price
    assert queue.status()["share"] == pytest.approx(0.6)
    queue.done(0)
    queue.claim(0)
    clock.now += 40  # half of what it takes, by what the first one took
    assert queue.status()["share"] == pytest.approx(0.8)


def test_a_lane_that_is_over_gives_its_unit_back(tmp_path: Path):
    queue = CellQueue(tmp_path, [priced("a", 10)], retries=1)
    queue.claim(0)
    queue.left(0)
    queue.left(1)  # has none
    assert queue.status()["waiting"] == 1
    again = queue.claim(1)
    assert again is not None
    assert again["trunk_id"] == "a"


def test_what_was_committed_counts_although_nobody_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    committed = {"a0"}
    monkeypatch.setattr("pipelines.sweep_queue.is_finished", lambda directory: directory.name in committed)
    queue = CellQueue(tmp_path, [priced("a", 10, 2), priced("b", 1)], retries=1)
    queue.claim(0)
    again = queue.claim(0)
    assert again is not None
    assert [cell["cell_id"] for cell in again["cells"]] == ["a1"]
    committed.add("a1")
    after = queue.claim(0)  # lost after its last commit: nothing is left of it
    assert after is not None
    assert after["trunk_id"] == "b"
    status = queue.status()
    assert (status["finished"], status["failed"], status["waiting"]) == (2, 0, 0)


def test_a_hang_is_told_by_how_slow_the_machine_is(tmp_path: Path):
    clock = Clock()
    queue = CellQueue(tmp_path, [priced("a", 10), priced("b", 1)], retries=0, clock=clock)
    first = queue.claim(0)
    assert first is not None
    assert first["timeout_s"] == 900
    clock.now += 40
    queue.done(0)
    second = queue.claim(0)
    assert second is not None
    assert second["timeout_s"] == 4 * 900
