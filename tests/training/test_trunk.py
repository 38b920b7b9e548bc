"""Runs that share a trunk end with what each of them alone ends with, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tokenized import Group, User, View, write_shards
from userrep.config import ConfigError
from userrep.data.augment import AugmentConfig
from userrep.data.split import SPLITS
from userrep.data.views import ViewConfig
from userrep.manifest import Manifest, write_manifest
from userrep.models.clue import Clue, ClueConfig
from userrep.training.checkpoint import Snapshot, restore_snapshot
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, build_optimizer, decay_start, learning_rate_factor
from userrep.training.settings import CluePretraining
from userrep.training.state import TrainState
from userrep.training.trunk import Hooks, Progress, run_trunk

VOCAB = 1000
CONFIG = CluePretraining(
    model=ClueConfig(dim=8, num_heads=2),
    views=ViewConfig(kinds=("time",), max_events=5),
    augment=AugmentConfig(cut="random", max_events=4),
    optim=OptimConfig(learning_rate=1e-2, schedule="wsd", warmup_steps=2, decay_fraction=0.25),
    global_batch_size=6,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty users in four row groups."""
    rng, groups = np.random.default_rng(0), list[Group]()
    for number in range(4):
        histories: list[View] = [
            [(f"item {rng.integers(30)}", t) for t in range(rng.integers(2, 9))] for _ in range(10)
        ]
        groups.append([User(f"user {number} {n}", SPLITS[0], {0: history}) for n, history in enumerate(histories)])
    directory = tmp_path_factory.mktemp("shards")
    facts = {"shards": write_shards(directory, [groups[:2], groups[2:]]), "tokenizer_digest": "t", "vocab_size": VOCAB}
    write_manifest(directory, Manifest(table="shards", stage="tokenize", config={}, facts=facts))
    return directory


def new_state() -> TrainState:
    torch.manual_seed(0)
    model = Clue(CONFIG.model, VOCAB)
    return TrainState(model=model, optimizer=build_optimizer(model, CONFIG.optim))


class Seen:
    """Hooks that keep everything."""

    def __init__(self) -> None:
        self.ends: dict[int, dict[str, torch.Tensor]] = {}
        self.progress: dict[int, Progress] = {}
        self.trunk: dict[int, tuple[Snapshot, Progress]] = {}
        self.num_steps = 0

    def hooks(self) -> Hooks:
        return Hooks(self.step, lambda state: float(state.step), self.on_trunk, self.finished)

    def step(self, num_steps: int, state: TrainState, progress: Progress) -> None:
        self.num_steps += 1
        assert len(progress.losses) == state.step <= num_steps

    def on_trunk(self, state: TrainState, progress: Progress) -> None:
        self.trunk[state.step] = Snapshot.take(state), progress.copy()

    def finished(self, num_steps: int, state: TrainState, progress: Progress) -> None:
        self.ends[num_steps] = {name: value.clone() for name, value in state.model.state_dict().items()}
        self.progress[num_steps] = progress


def run(shards: Path, durations: list[int], state: TrainState | None = None, progress: Progress | None = None) -> Seen:
    seen, state = Seen(), state or new_state()
    run_trunk(CONFIG, durations, state, ClueObjective(state.model), shards, seen.hooks(), progress)
    return seen


def assert_same_end(one: Seen, other: Seen, num_steps: int) -> None:
    for name, value in one.ends[num_steps].items():
        assert torch.equal(value, other.ends[num_steps][name]), name
    assert one.progress[num_steps].losses == other.progress[num_steps].losses


def test_branches_end_as_runs_on_their_own_do(shards: Path):
    together = run(shards, [4, 9, 16])
    assert list(together.ends) == [4, 9, 16]
    for num_steps in (4, 9, 16):
        assert_same_end(together, run(shards, [num_steps]), num_steps)
    # 16 steps of the longest, and the decays of the other two.
    assert together.num_steps == 16 + 1 + 2
    # At an eighth, a quarter, half and all of the steps before each decay, where the trunk had not been before.
    assert [step for step, _ in together.progress[16].curve] == [1, 2, 3, 4, 7, 12]


def test_a_trunk_goes_on_from_any_place_where_it_could_be_saved(shards: Path):
    whole = run(shards, [4, 9, 16])
    for step, (snapshot, progress) in whole.trunk.items():
        durations = [n for n in (4, 9, 16) if decay_start(n, CONFIG.optim) >= step]
        state = new_state()
        restore_snapshot(snapshot, state)
        assert state.step == step
        rest = run(shards, durations, state, progress)
        for num_steps in durations:
            assert_same_end(whole, rest, num_steps)


def test_a_smaller_share_of_users_sees_some_of_them_only(shards: Path):
    from userrep.training.settings import open_training_stream

    seen: dict[float, set[int]] = {}
    for share in (0.15, 0.4, 1.0):
        config = CONFIG.model_copy(update={"user_share": share})
        stream = open_training_stream(shards, config, 20)
        assert stream.plan.num_samples == (round(share * 40),)
        seen[share] = {int(key) for batch in stream.batches() for key in batch.user_keys}
        assert len(seen[share]) == round(share * 40)
    assert seen[0.15] < seen[0.4] < seen[1.0]
    with pytest.raises(ConfigError, match="larger than the 4 training samples"):
        open_training_stream(shards, CONFIG.model_copy(update={"user_share": 0.1}), 20)


def test_ranks_share_a_batch_as_one_worker_sees_it(shards: Path):
    from userrep.training.settings import open_training_stream

    stream = open_training_stream(shards, CONFIG, 10)
    parts = zip(stream.batches(3), stream.batches(3, 0, 2), stream.batches(3, 1, 2), strict=True)
    for whole, first, second in parts:
        assert whole.step == first.step == second.step >= 3
        assert whole.user_keys.tolist() == [*first.user_keys.tolist(), *second.user_keys.tolist()]


def test_the_rate_is_the_same_for_all_durations_until_it_decays():
    optim = OptimConfig(schedule="wsd", warmup_steps=4, decay_fraction=0.25, final_fraction=0.1)
    short, long = ([learning_rate_factor(step, n, optim) for step in range(n)] for n in (20, 40))
    assert short[: decay_start(20, optim)] == long[: decay_start(20, optim)]
    assert short[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert set(long[4 : decay_start(40, optim)]) == {1.0}
    decay = long[decay_start(40, optim) :]
    assert decay == sorted(decay, reverse=True)
    assert decay[-1] == pytest.approx(0.1)
    assert decay[0] == pytest.approx(0.1 + 0.9 * (1 - 0.1**0.5))  # one of ten steps, 1 - sqrt


def test_a_rate_that_decays_all_the_way_has_no_trunk(shards: Path):
    config = CONFIG.model_copy(update={"optim": OptimConfig()})
    state = new_state()
    with pytest.raises(ConfigError, match="schedule=cosine"):
        run_trunk(config, [4], state, ClueObjective(state.model), shards, Seen().hooks())
