"""The verdict on fabricated ledgers: what a run may do after a fault, and everything that it must not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.chaos_verdict import Outcome, check_plan, count_starts, find_differences, read_outcome, recovery_s
from tests.support.tokenized import User, write_shards
from userrep.data.stream import ShardSet, TrainingStream, open_stream
from userrep.data.views import ViewConfig
from userrep.manifest import Manifest, write_manifest
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.training.ledger import LEDGER_NAME
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, build_optimizer
from userrep.training.settings import CluePretraining
from userrep.training.state import TrainState, train_step

NUM_STEPS = 12


def line(attempt: int, step: int) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "batch_hash": f"h{step}", "loss": 1 / step, "time_ms": 0}


ALL_STEPS = frozenset(range(1, NUM_STEPS + 1))
UNDISTURBED = Outcome([line(1, step) for step in sorted(ALL_STEPS)], ALL_STEPS, b"weights")


def differences(lines: list[dict[str, Any]], weights: bytes | None = b"weights") -> list[str]:
    return find_differences(UNDISTURBED, Outcome(lines, ALL_STEPS, weights), NUM_STEPS)


@st.composite
def disturbed(draw: st.DrawFn, min_attempts: int = 1) -> list[dict[str, Any]]:
    """Ledger of a correct run: attempts that die at some step and are resumed at or before it."""
    lines, start = [], 0
    for attempt in range(1, draw(st.integers(min_attempts, 4)) + 1):
        stop = draw(st.integers(start + 1, NUM_STEPS))
        lines += [line(attempt, step) for step in range(start + 1, stop + 1)]
        start = draw(st.integers(0, min(stop, NUM_STEPS - 1)))
    last = lines[-1]["attempt"] + 1
    return lines + [line(last, step) for step in range(start + 1, NUM_STEPS + 1)]


@given(lines=disturbed())
def test_a_run_that_was_resumed_exactly_passes(lines: list[dict[str, Any]]) -> None:
    assert differences(lines) == []


@given(lines=disturbed(), data=st.data())
def test_another_hash_in_any_line_fails_also_where_the_step_was_right_once(
    lines: list[dict[str, Any]], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = lines[place] | {"batch_hash": "other"}
    (problem,) = differences(lines)
    assert problem == f"other samples than in the undisturbed run: step {lines[place]['step']}"


@given(lines=disturbed(), step=st.integers(1, NUM_STEPS))
def test_a_step_that_nobody_took_fails(lines: list[dict[str, Any]], step: int) -> None:
    left = [entry for entry in lines if entry["step"] != step]
    (problem,) = differences(left)
    assert problem == f"never taken: step {step}"


def test_a_step_beyond_the_end_fails() -> None:
    lines = [*UNDISTURBED.lines, line(1, NUM_STEPS + 1)]
    assert differences(lines)


@given(lines=disturbed(min_attempts=2), data=st.data())
def test_a_line_of_a_replaced_attempt_fails(lines: list[dict[str, Any]], data: st.DataObject) -> None:
    starts = [place for place, entry in enumerate(lines) if place and entry["attempt"] > lines[place - 1]["attempt"]]
    start = data.draw(st.sampled_from(starts))
    place = data.draw(st.integers(start + 1, len(lines)))
    lines.insert(place, lines[start - 1])
    (problem,) = differences(lines)
    assert problem == f"written by an attempt that had been replaced: step {lines[place]['step']}"


@pytest.mark.parametrize("weights", [b"weightt", b"weights ", None])
def test_other_weights_or_none_fail(weights: bytes | None) -> None:
    (problem,) = differences(UNDISTURBED.lines, weights)
    assert "bit-equal; all losses are equal" in problem or "no intact checkpoint" in problem


def test_other_weights_name_the_first_other_loss() -> None:
    lines = [*UNDISTURBED.lines[:6], *(entry | {"loss": 0.0} for entry in UNDISTURBED.lines[6:])]
    (problem,) = differences(lines, b"other")
    assert "the loss differs from step 7 on" in problem


def test_a_step_without_metrics_fails() -> None:
    outcome = Outcome(UNDISTURBED.lines, ALL_STEPS - {5}, b"weights")
    assert find_differences(UNDISTURBED, outcome, NUM_STEPS) == ["without metrics: step 5"]


def test_a_run_that_did_nothing_fails_and_its_problems_are_counted(tmp_path: Path) -> None:
    outcome = read_outcome(tmp_path / "absent", NUM_STEPS)
    assert find_differences(UNDISTURBED, outcome, NUM_STEPS) == [
        "never taken: step 1, 2, 3 and 9 more",
        "without metrics: step 1, 2, 3 and 9 more",
        "there is no intact checkpoint of step 12",
    ]


def test_starts_are_the_steps_that_attempts_began_with() -> None:
    lines = [line(1, 1), line(1, 2), line(1, 3), line(2, 3), line(2, 4), line(4, 1)]
    assert count_starts(lines) == [0, 2, 0]
    assert count_starts([]) == []


def at(step: int, time_ms: int) -> dict[str, Any]:
    return line(1, step) | {"time_ms": time_ms}


def test_recovery_is_the_longest_time_without_a_new_step() -> None:
    lines = [at(1, 1000), at(2, 2000), at(1, 7000), at(2, 8000), at(3, 9000), at(4, 10_000)]
    assert recovery_s(lines, fault_ms=2500) == 6.5
    assert recovery_s(lines, fault_ms=1500) == 7.0  # the step after the fault was still taken
    assert recovery_s(lines, fault_ms=9500) == 0.5
    assert recovery_s(lines, fault_ms=11_000) == 0
    assert recovery_s([], fault_ms=0) == 0


CONFIG = CluePretraining(views=ViewConfig(kinds=("time",)), global_batch_size=4, num_steps=11, seed=3)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """19 users, one sample each, so 11 steps of 4 are two epochs and 6 samples of a third."""
    users = [User(f"user {number}", "train", {0: [("a", 1), ("b", 2)]}) for number in range(19)]
    other = User("held out", "test", {0: [("a", 1), ("b", 2)]})
    facts = write_shards(tmp_path, [[users[:7], users[7:12]], [[*users[12:], other]]])
    write_manifest(tmp_path, Manifest(table="shards", stage="test", config={}, facts={"shards": facts}))
    return tmp_path


def trained_on(shards: Path, config: CluePretraining) -> Outcome:
    """The ledger of a small model that was trained on the batches of the plan."""
    torch.manual_seed(0)
    model, optim = BagOfTokens(1000, 4), OptimConfig()
    state, objective = TrainState(model=model, optimizer=build_optimizer(model, optim)), ClueObjective(model)
    sets = [ShardSet(shards, json.loads((shards / "manifest.json").read_text())["facts"]["shards"])]
    size, seed, num_steps = config.global_batch_size, config.seed, config.num_steps
    lines = []
    for batch in open_stream(sets, config.views, config.augment, size, seed, num_steps).batches():
        train_step(objective, state, batch, optim, num_steps)
        lines.append({"attempt": 1, "step": state.step, "batch_hash": state.batch_hash})
    return Outcome(lines, frozenset(), None)


def test_the_undisturbed_run_is_that_of_the_plan(shards: Path) -> None:
    outcome = trained_on(shards, CONFIG)
    assert check_plan(outcome, shards, CONFIG) == []
    other = CONFIG.model_copy(update={"seed": 4})
    assert check_plan(outcome, shards, other) == ["other samples than in the plan: step 1, 2, 3 and 8 more"]
    outcome.lines[4]["batch_hash"] = "other"
    assert check_plan(outcome, shards, CONFIG) == ["other samples than in the plan: step 5"]


def test_a_plan_that_repeats_a_batch_fails(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, batches = trained_on(shards, CONFIG), TrainingStream.batches

    def repeat_the_first(stream: TrainingStream) -> list[Any]:
        first, _, *others = batches(stream)
        return [first, first, *others]

    monkeypatch.setattr(TrainingStream, "batches", repeat_the_first)
    assert check_plan(outcome, shards, CONFIG) == [
        "other samples than in the plan: step 2, 3, 4 and 7 more",
        "epoch 0 holds 4 samples more than once",
        "epoch 0 leaves out 4 samples",
    ]


def test_read_outcome_takes_the_ledger_of_the_run(tmp_path: Path) -> None:
    (tmp_path / LEDGER_NAME).write_text("".join(json.dumps(entry) + "\n" for entry in UNDISTURBED.lines) + '{"at')
    outcome = read_outcome(tmp_path, NUM_STEPS)
    assert outcome == Outcome(UNDISTURBED.lines, frozenset(), None)
    assert outcome.num_useful == NUM_STEPS
