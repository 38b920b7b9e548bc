"""The loop on Ray, with workers that die, hang and disagree at chosen steps, against steps taken in this process."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
from ray.train import PreemptionInfo

from tests.support.tokenized import User, write_shards
from userrep import table_versions
from userrep.config import ConfigError
from userrep.data.augment import AugmentConfig
from userrep.data.tokenizer import IDF_NAME
from userrep.data.views import ViewConfig
from userrep.manifest import Manifest, describe_file, read_manifest, write_manifest
from userrep.mirror import locate, scratch
from userrep.models.clue import ClueConfig
from userrep.training import loop
from userrep.training.checkpoint import CHECKPOINTS, MODEL_FILE, STATE_FILE, list_checkpoints, restore_checkpoint
from userrep.training.encoding import MemoryConfig
from userrep.training.fence import ATTEMPT_NAME, StaleAttemptError, take_over
from userrep.training.launch import TrainingError, train
from userrep.training.ledger import LEDGER_NAME, read_ledger
from userrep.training.log_pieces import receive_log
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig
from userrep.training.settings import (
    CluePretraining,
    MixConfig,
    WorkersConfig,
    check_batch_divides,
    open_training_stream,
)
from userrep.training.state import TrainState, train_step
from userrep.training.systems import build_state

VOCAB_SIZE = 1010
NUM_STEPS = 14
RESTART_LIMIT_S = 60  # assumption: the start of a worker group takes less, on a busy machine too
CONFIG = CluePretraining(
    model=ClueConfig(dim=8, num_heads=2),
    views=ViewConfig(kinds=("service",), max_events=6),
    augment=AugmentConfig(cut="random", min_keep=0.5, max_events=6, token_drop=0.2),
    optim=OptimConfig(bag_steps=2),
    global_batch_size=7,  # two workers have 3 and 4
    num_steps=NUM_STEPS,
    validate_every=5,
    pool_size=6,
    seed=5,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenized table; the run is somewhat more than three epochs of its 30 training users."""
    return write_table(tmp_path_factory.mktemp("table"), num_groups=6, seed=0)


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("other"), num_groups=3, seed=1)


def write_table(directory: Path, num_groups: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    groups: list[list[User]] = []
    for number in range(num_groups):
        users = []
        for user in range(6):
            histories: dict[int, Any] = {
                service: [(f"item {rng.integers(30)}", t) for t in range(rng.integers(2, 7))] for service in (0, 1)
            }
            users.append(User(f"user {number}-{user}", "train" if user else "validation", histories))
        groups.append(users)
    facts = {
        "shards": write_shards(directory, [groups[:3], groups[3:]]),
        "vocab_size": VOCAB_SIZE,
        "tokenizer_digest": "1" * 64,
    }
    idf = np.ones(VOCAB_SIZE, dtype=np.float32)
    pq.write_table(pa.table({"token_id": np.arange(VOCAB_SIZE), "idf": idf}), directory / IDF_NAME)
    write_manifest(directory, Manifest(table="shards", stage="tokenize", config={}, facts=facts))
    return directory


def workers(num_workers: int | tuple[int, int] = 1, max_failures: int = 3) -> WorkersConfig:
    return WorkersConfig(
        num_workers=num_workers, threads=1, max_failures=max_failures, memory=MemoryConfig(budget_mib=64)
    )


def undisturbed(shards: Path, config: CluePretraining = CONFIG) -> tuple[TrainState, list[str], list[float]]:
    """State, batch hashes and losses of the run, without Ray."""
    torch.set_num_threads(1)
    state = build_state(config, shards)
    objective = ClueObjective(state.model, config.optim.bag_steps, config.loss, MemoryConfig(budget_mib=64))
    hashes, losses = [], []
    for batch in open_training_stream(shards, config).batches():
        losses.append(train_step(objective, state, batch, config.optim, NUM_STEPS)["train/loss"])
        hashes.append(state.batch_hash)
    return state, hashes, losses


def final_state(run_dir: Path, shards: Path) -> TrainState:
    state = build_state(CONFIG, shards)
    restore_checkpoint(list_checkpoints(run_dir / CHECKPOINTS)[-1], state)
    return state


def assert_bit_equal(state: TrainState, expected: TrainState) -> None:
    assert state.progress() == expected.progress()
    for name, value in expected.model.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], value), name


def disturbed(settings: dict[str, Any], step: int, disturb: Callable[[Path], None], attempt: int = 1) -> str | None:
    """Runs in the worker's process: the real worker, disturbed after `step` steps of one attempt."""
    run_dir = Path(settings["run_dir"])
    take = loop.train_step

    def disturbed_step(objective: Any, state: TrainState, *args: Any) -> dict[str, float]:
        metrics = take(objective, state, *args)
        if state.step == step and json.loads((run_dir / ATTEMPT_NAME).read_text())["attempt"] == attempt:
            disturb(run_dir)
        return metrics

    with mock.patch.object(loop, "train_step", disturbed_step):
        return loop.train_worker(settings)


def is_last() -> bool:
    context = ray.train.get_context()
    return context.get_world_rank() == context.get_world_size() - 1


def kill_self(_: Path) -> None:
    if is_last():
        os.kill(os.getpid(), signal.SIGKILL)


def stop_self(_: Path) -> None:
    if is_last():
        os.kill(os.getpid(), signal.SIGSTOP)


def hang(_: Path) -> None:
    while True:
        time.sleep(1)


def fail(_: Path) -> None:
    raise RuntimeError("as planned")


def lose_the_run(run_dir: Path) -> None:
    take_over(run_dir, "another job")


def killed_worker(settings: dict[str, Any]) -> str | None:
    return disturbed(settings, 6, kill_self)


def stopped_worker(settings: dict[str, Any]) -> str | None:
    return disturbed(settings, 6, stop_self)


def hung_worker(settings: dict[str, Any]) -> str | None:
    return disturbed(settings, 6, hang)


def replaced_worker(settings: dict[str, Any]) -> str | None:
    return disturbed(settings, 4, lose_the_run)


def worker_that_fails_after_4(settings: dict[str, Any]) -> str | None:
    return disturbed(settings, 4, fail, attempt=1)


def worker_that_fails_after_9(settings: dict[str, Any]) -> str | None:
    return disturbed(settings, 9, fail, attempt=2)


def poisoned_worker(settings: dict[str, Any]) -> str | None:
    """The last rank computes a loss that is not a number in step 3."""
    forward = ClueObjective.forward

    def poisoned(self: ClueObjective, batch: Any) -> Any:
        loss, facts = forward(self, batch)
        return (loss * float("nan") if batch.step == 3 and is_last() else loss), facts

    with mock.patch.object(ClueObjective, "forward", poisoned):
        return loop.train_worker(settings)


on_ray = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.ray
@on_ray
def test_a_killed_worker_leaves_no_trace_also_with_a_mixture(
    shards: Path, other_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = CONFIG.model_copy(update={"mix": (MixConfig(shards=other_shards, weight=0.5),)})
    monkeypatch.setattr(loop, "train_worker", killed_worker)
    train(shards, tmp_path, mixture, workers(1))
    expected, hashes, losses = undisturbed(shards, mixture)
    assert hashes[0] != undisturbed(shards)[1][0]
    lines = read_ledger(tmp_path / LEDGER_NAME)
    assert {line["step"] for line in lines} == set(range(1, NUM_STEPS + 1))
    assert {line["attempt"] for line in lines} == {1, 2}
    for line in lines:
        assert line["batch_hash"] == hashes[line["step"] - 1]
        assert line["loss"] == losses[line["step"] - 1]
    assert_bit_equal(final_state(tmp_path, shards), expected)
    # Once more: nothing is left to do.
    train(shards, tmp_path, mixture, workers(1))
    assert read_ledger(tmp_path / LEDGER_NAME) == lines


@pytest.mark.ray
@on_ray
def test_a_run_in_object_storage_survives_the_loss_of_every_node(
    shards: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, run_dir = locate(f"{bucket}/shards"), locate(f"{bucket}/runs/one")
    with table_versions.staged_table(table) as staging:
        shutil.copytree(shards, staging, dirs_exist_ok=True)
        files = tuple(describe_file(staging, path) for path in sorted(staging.glob("*.*")) if path.stem != "manifest")
        write_manifest(staging, read_manifest(shards).model_copy(update={"files": files}))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_worker", killed_worker)
        with pytest.raises(TrainingError):
            train(table_versions.open_table(table), run_dir, CONFIG, workers(max_failures=0))
    assert list_checkpoints(run_dir / CHECKPOINTS)
    shutil.rmtree(locate(bucket))  # whatever was on a disk
    train(table_versions.open_table(table), run_dir, CONFIG, workers())
    expected, hashes, losses = undisturbed(shards)
    receive_log(run_dir / LEDGER_NAME)
    lines = read_ledger(run_dir / LEDGER_NAME)
    assert {line["step"] for line in lines} == set(range(1, NUM_STEPS + 1))
    assert {line["attempt"] for line in lines} == {1, 2}
    assert next(line["step"] for line in lines if line["attempt"] == 2) > 1, "it went on from a checkpoint"
    for line in lines:
        assert (line["batch_hash"], line["loss"]) == (hashes[line["step"] - 1], losses[line["step"] - 1])
    assert_bit_equal(final_state(run_dir, shards), expected)
    assert not list(scratch().glob("private-*")), "what only the writer needed is gone"


@pytest.mark.ray
@pytest.mark.slow
@on_ray
@pytest.mark.parametrize(("worker", "count"), [(stopped_worker, 2), (hung_worker, 1)])
def test_a_worker_that_hangs_is_given_up_within_30_s(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: Any, count: int
) -> None:
    monkeypatch.setattr(loop, "train_worker", worker)
    train(shards, tmp_path, CONFIG, workers((count, count)))
    lines = read_ledger(tmp_path / LEDGER_NAME)
    assert {line["attempt"] for line in lines} == {1, 2}
    _, hashes, _ = undisturbed(shards)
    assert {line["step"]: line["batch_hash"] for line in lines} == dict(enumerate(hashes, start=1))
    # Mostly the start of the next group, 5 to 20 s here, comes on top of the 30 s.
    restarted = next(after["time_ms"] - before["time_ms"] for before, after in pairwise(lines) if after["attempt"] == 2)
    assert restarted < 1000 * (30 + RESTART_LIMIT_S)


@pytest.mark.ray
@pytest.mark.slow
@on_ray
def test_two_then_one_then_two_workers_take_the_same_steps(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed_worker = loop.train_worker
    for worker, count in ((worker_that_fails_after_4, (2, 2)), (worker_that_fails_after_9, (1, 1))):
        monkeypatch.setattr(loop, "train_worker", worker)
        with pytest.raises(TrainingError, match="as planned"):
            train(shards, tmp_path, CONFIG, workers(count, max_failures=0))
    monkeypatch.setattr(loop, "train_worker", undisturbed_worker)
    train(shards, tmp_path, CONFIG, workers((1, 2)))
    expected, hashes, losses = undisturbed(shards)
    lines = read_ledger(tmp_path / LEDGER_NAME)
    assert {line["attempt"] for line in lines} == {1, 2, 3}
    assert {line["step"] for line in lines} == set(range(1, NUM_STEPS + 1))
    for line in lines:
        assert line["batch_hash"] == hashes[line["step"] - 1]
        assert line["loss"] == pytest.approx(losses[line["step"] - 1], rel=1e-5)
    assert final_state(tmp_path, shards).progress() == expected.progress()


@pytest.mark.ray
@pytest.mark.slow
@on_ray
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_evidence(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train_worker", poisoned_worker)
    with pytest.raises(TrainingError, match="step 3: the loss is not finite on rank 1 of 2"):
        train(shards, tmp_path, CONFIG, workers((2, 2)))
    evidence = json.loads((tmp_path / "non-finite-step-00000003.json").read_text())
    assert [facts["loss"] == "nan" for facts in evidence["ranks"]] == [False, True]
    assert len(evidence["user_keys"]) == CONFIG.global_batch_size
    # It is not tried again: the same step would end the same way.
    assert [(line["attempt"], line["step"]) for line in read_ledger(tmp_path / LEDGER_NAME)] == [(1, 1), (1, 2), (1, 3)]


@pytest.mark.ray
@pytest.mark.slow
@on_ray
def test_a_job_that_has_lost_its_run_ends(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_worker", replaced_worker)
    with pytest.raises(StaleAttemptError, match="another job"):
        train(shards, tmp_path, CONFIG, workers(1))
    assert [line["step"] for line in read_ledger(tmp_path / LEDGER_NAME)] == [1, 2, 3]
    for checkpoint in list_checkpoints(tmp_path / CHECKPOINTS):
        assert json.loads((checkpoint / STATE_FILE).read_text())["step"] <= 3
        assert (checkpoint / MODEL_FILE).is_file()


def test_the_batch_must_suit_the_workers() -> None:
    check_batch_divides(CONFIG, workers(7))
    check_batch_divides(CONFIG, workers((1, 5)))
    with pytest.raises(ConfigError, match=r"does not divide over workers\.num_workers=2"):
        check_batch_divides(CONFIG, workers(2))
    with pytest.raises(ConfigError, match="too small for up to 8 workers"):
        check_batch_divides(CONFIG, workers((2, 8)))
    with pytest.raises(ConfigError, match="fewest first"):
        WorkersConfig.parse({"num_workers": [3, 2]})
    assert WorkersConfig().with_overrides(["num_workers=[1, 3]"]).bounds == (1, 3)


def test_a_notice_is_news_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = PreemptionInfo(1000, {"node": [1]}), PreemptionInfo(1000, {"node": [1], "other": [0]})
    answers = iter([None, one, one, other])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(answers))
    notice = loop._Notice()
    interval_s = loop.PREEMPTION_INTERVAL_S
    times = [100.0, 100.0 + interval_s / 2, *(100.0 + n * interval_s for n in (1, 2, 2.5, 3))]
    assert [notice.look(time_s) for time_s in times] == [False, False, True, False, False, True]
    assert next(answers, "asked four times") == "asked four times"
