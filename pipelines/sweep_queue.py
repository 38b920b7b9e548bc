"""Which cells lanes run next, and what has become of those that they took; the driver makes an actor of it.

Units (cells that share a trunk) are handed out the most expensive first, so that the last ones to end are short. Where
time is limited, one that would not end in time is passed over for a cheaper one.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pipelines.sweep_cell import is_finished
from userrep.manifest import write_json

STATUS_NAME = "lanes.json"
JOURNAL_NAME = "journal.jsonl"
FAILURE_NAME = "failure.json"
STATUS_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Priced:
    """A unit that may be run.

    Attributes:
        unit: JSON-plain, what a lane needs to know; `cells` lists `cell_id`s, `trunk_id` names it.
        seconds: that it is expected to take in a lane.
    """

    unit: dict[str, Any]
    seconds: float

    @property
    def trunk_id(self) -> str:
        """Name of the unit."""
        return self.unit["trunk_id"]

    @property
    def cell_ids(self) -> list[str]:
        """Of its cells."""
        return [cell["cell_id"] for cell in self.unit["cells"]]


@dataclass
class _Open:
    """A unit in a lane."""

    priced: Priced
    started_s: float
    finished: set[str] = field(default_factory=set)
    step: int = 0
    num_steps: int = 0
    note: str = ""
    reason: str = "out of memory, a hang, or a crash"  # why its worker may have been lost


class CellQueue:
    """Deals units to lanes.

    A lane that asks for a unit while it has one has lost its worker: the unit is tried again, `retries` times, and then
    its cells have failed; others go on.
    """

    def __init__(
        self,
        directory: Path,
        priced: list[Priced],
        retries: int,
        max_seconds: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args: max_seconds is what the sweep may take from now on."""
        self._directory, self._retries, self._clock = directory, retries, clock
        self._waiting = sorted(priced, key=lambda p: -p.seconds)
        self._open: dict[int, _Open] = {}
        self._losses: dict[str, int] = {}
        self._slowdowns: list[float] = []
        self._began_s = clock()
        self._deadline_s = None if max_seconds is None else self._began_s + max_seconds
        self._passed_over: list[Priced] = []
        self._total_s, self._done_s = sum(p.seconds for p in priced), 0.0
        self._shown_s = 0.0
        self.num_finished, self.num_failed = 0, 0
        directory.mkdir(parents=True, exist_ok=True)

    def claim(self, lane: int) -> dict[str, Any] | None:
        """The next unit for a lane; None: there is none that would end in time."""
        now = self._clock()
        if lane in self._open:
            self._lost(lane)
        for place, priced in enumerate(self._waiting):
            if self._deadline_s is None or now + self._expected(priced) <= self._deadline_s:
                del self._waiting[place]
                self._open[lane] = _Open(priced, now)
                self._note("start", lane, trunk_id=priced.trunk_id, cell_ids=priced.cell_ids)
                self._show()
                # A crowded machine is no hang: what units have taken so far stretches what this one may take.
                return {**priced.unit, "timeout_s": priced.unit["timeout_s"] * max(1.0, self._slowdown)}
        self._passed_over, self._waiting = self._passed_over + self._waiting, []
        self._show()
        return None

    def beat(self, lane: int, step: int, num_steps: int, note: str) -> None:
        """What a lane is at."""
        if (at := self._open.get(lane)) is not None:
            at.step, at.num_steps, at.note = step, num_steps, note
            if self._clock() - self._shown_s > STATUS_INTERVAL_S:
                self._show()

    def finished(self, lane: int, cell_id: str) -> None:
        """A cell of the lane's unit has been committed."""
        self._open[lane].finished.add(cell_id)
        self.num_finished += 1
        self._note("finish", lane, cell_id=cell_id)
        self._show()

    def done(self, lane: int) -> None:
        """The lane's unit is over."""
        at = self._open.pop(lane)
        self._done_s += at.priced.seconds
        self._slowdowns.append((self._clock() - at.started_s) / at.priced.seconds)
        self._show()

    def failed(self, lane: int, message: str, is_final: bool) -> None:
        """The lane's unit cannot be finished; its other cells stay as they are.

        Args:
            lane: that has it.
            message: why.
            is_final: it would fail again, as a run that diverges.
        """
        self._fail(self._open.pop(lane), lane, message, is_final)

    def explain(self, lane: int, reason: str) -> None:
        """Keeps why a worker of the lane is about to end."""
        if (at := self._open.get(lane)) is not None:
            at.reason = reason

    def left(self, lane: int) -> None:
        """The lane is over: a unit that it still has is lost."""
        if lane in self._open:
            self._lost(lane)
            self._show()

    def status(self) -> dict[str, Any]:
        """JSON-plain, for people: counts, lanes, and seconds until the last unit ends."""
        now = self._clock()
        lanes = {
            lane: {
                "trunk_id": at.priced.trunk_id,
                "label": at.priced.unit.get("label", ""),
                "step": at.step,
                "num_steps": at.num_steps,
                "note": at.note,
                "seconds": now - at.started_s,
                "expected_s": self._expected(at.priced),
            }
            for lane, at in sorted(self._open.items())
        }
        return {
            "time_s": now,
            "elapsed_s": now - self._began_s,
            "finished": self.num_finished,
            "failed": self.num_failed,
            "waiting": sum(len(p.cell_ids) for p in self._waiting),
            "passed_over": [cell_id for priced in self._passed_over for cell_id in priced.cell_ids],
            "left_s": self._left(now),
            # Of the price of all units, the share of what is over or under way.
            "share": min(1.0, (self._done_s + sum(self._share(at, now) for at in self._open.values())) / self._total_s)
            if self._total_s
            else 1.0,
            "slowdown": self._slowdown,
            "lanes": lanes,
        }

    @property
    def _slowdown(self) -> float:
        """Seconds that units take over what they were priced at."""
        return median(self._slowdowns) if self._slowdowns else 1.0

    def _expected(self, priced: Priced) -> float:
        return priced.seconds * self._slowdown

    def _share(self, at: _Open, now: float) -> float:
        """Of the price of a unit, what is done by now."""
        return min(at.priced.seconds, (now - at.started_s) / self._slowdown)

    def _left(self, now: float) -> float:
        """Seconds until the last lane is done, if each takes the next unit when it is free."""
        loads = [max(0.0, self._expected(at.priced) - (now - at.started_s)) for at in self._open.values()] or [0.0]
        for priced in self._waiting:
            loads[loads.index(min(loads))] += self._expected(priced)
        return max(loads)

    def _lost(self, lane: int) -> None:
        at = self._open.pop(lane)
        self._take_note_of_commits(at)
        if at.finished >= set(at.priced.cell_ids):  # lost between its last commit and saying so
            self._done_s += at.priced.seconds
            return
        trunk_id = at.priced.trunk_id
        self._losses[trunk_id] = self._losses.get(trunk_id, 0) + 1
        self._note("lost", lane, trunk_id=trunk_id)
        if self._losses[trunk_id] > self._retries:
            message = f"its worker was lost {self._losses[trunk_id]} times: {at.reason}"
            self._fail(at, lane, message, is_final=False)
            return
        cells = [cell for cell in at.priced.unit["cells"] if cell["cell_id"] not in at.finished]
        self._waiting.insert(0, Priced({**at.priced.unit, "cells": cells}, at.priced.seconds))

    def _take_note_of_commits(self, at: _Open) -> None:
        """What counts is what was committed, whether the worker lived to say so or not."""
        for cell_id in at.priced.cell_ids:
            if cell_id not in at.finished and is_finished(self._directory / "cells" / cell_id):
                at.finished.add(cell_id)
                self.num_finished += 1

    def _fail(self, at: _Open, lane: int, message: str, is_final: bool) -> None:
        self._take_note_of_commits(at)
        for cell_id in at.priced.cell_ids:
            if cell_id not in at.finished:
                self.num_failed += 1
                path = self._directory / "cells" / cell_id
                path.mkdir(parents=True, exist_ok=True)
                write_json(path / FAILURE_NAME, {"message": message, "is_final": is_final})
                self._note("fail", lane, cell_id=cell_id, message=message)
        self._show()

    def _note(self, event: str, lane: int, **values: Any) -> None:
        line = json.dumps({"time_s": round(self._clock(), 3), "event": event, "lane": lane, **values})
        with (self._directory / JOURNAL_NAME).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _show(self) -> None:
        self._shown_s = self._clock()
        write_json(self._directory / STATUS_NAME, self.status())
