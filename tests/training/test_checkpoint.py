"""Checkpoints: what is kept, and what damage does."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.tiny_run import OPTIM, make_state, new_attempt, run_steps, save, weights
from userrep.manifest import MANIFEST_NAME
from userrep.models.clue import Clue, ClueConfig
from userrep.training.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointMismatchError,
    best_checkpoint,
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    recover_checkpoint,
    restore_checkpoint,
)
from userrep.training.fence import StaleAttemptError
from userrep.training.optim import build_optimizer
from userrep.training.state import TrainState

FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, MANIFEST_NAME)


def names(directory: Path) -> list[str]:
    return [path.name for path in list_checkpoints(directory)]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("run")
    attempt, state = new_attempt(run_dir), make_state(torch.float32)
    for step in (1, 2):
        run_steps(state, step, 2)
        save(attempt, state, recall=step / 10)
    return run_dir


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(-1, 7))
def test_any_damage_to_the_newest_checkpoint_is_noticed(
    two_checkpoints: Path, tmp_path: Path, name: str, place: float, bit: int
) -> None:
    directory = tmp_path / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(two_checkpoints / "checkpoints", directory)
    older, newest = list_checkpoints(directory)
    intact = (newest / name).read_bytes()
    content = bytearray(intact)
    position = int(place * len(content))
    if bit < 0:
        content = content[:position]
    else:
        content[position] ^= 1 << bit
    (newest / name).write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, best = latest_checkpoint(directory), best_checkpoint(directory)
    if found == newest:  # the manifest says the same without its last newline
        assert name == MANIFEST_NAME
        assert json.loads(content) == json.loads(intact)
    else:
        assert found == best == older
        assert any("passed over" in str(warning.message) for warning in caught)


def test_a_damaged_checkpoint_does_not_push_out_those_that_replace_it(tmp_path: Path) -> None:
    attempt, state = new_attempt(tmp_path), make_state()
    directory = tmp_path / "checkpoints"
    for state.step in (10, 20, 30):
        save(attempt, state, recall=None)
    (directory / names(directory)[-1] / MODEL_FILE).write_bytes(b"")
    shutil.copytree(directory / names(directory)[0], directory / ".step-00000040-attempt-0001.staging")
    with pytest.warns(UserWarning, match="passed over"):
        found = recover_checkpoint(directory)
    assert found is not None
    assert found.name == "step-00000020-attempt-0001"
    aside, *others = sorted(path.name for path in directory.iterdir())
    assert others == ["step-00000010-attempt-0001", "step-00000020-attempt-0001"]
    assert aside.startswith("damaged-")  # for people: it may have been the reading that was wrong
    assert aside.endswith("-step-00000030-attempt-0001")
    state.step = 25
    save(new_attempt(tmp_path), state, recall=None, keep=1)
    assert names(directory) == ["step-00000025-attempt-0002"]


def test_nothing_intact_means_a_new_start(tmp_path: Path) -> None:
    assert recover_checkpoint(tmp_path / "checkpoints") is None
    checkpoint = save(new_attempt(tmp_path), make_state())
    (checkpoint / STATE_FILE).unlink()
    with pytest.warns(UserWarning, match="passed over"):
        assert recover_checkpoint(tmp_path / "checkpoints") is None
    assert checkpoint_step(None) == 0


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    attempt, state = new_attempt(tmp_path), make_state()
    recalls = (0.1, None, 0.4, None, 0.2, None, 0.3, None)  # between validations there are others
    for state.step, recall in enumerate(recalls):
        save(attempt, state, recall, keep=2)
    assert names(tmp_path / "checkpoints") == [f"step-0000000{step}-attempt-0001" for step in (2, 6, 7)]
    best = best_checkpoint(tmp_path / "checkpoints")
    assert best is not None
    assert checkpoint_step(best) == 2


def test_the_newest_of_equally_good_ones_is_the_best(tmp_path: Path) -> None:
    attempt, state = new_attempt(tmp_path), make_state()
    for state.step, recall in enumerate((None, 0.4, 0.4, 0.3)):
        save(attempt, state, recall)
    best = best_checkpoint(tmp_path / "checkpoints")
    assert best is not None
    assert checkpoint_step(best) == 2


def test_without_a_validation_there_is_no_best_checkpoint(tmp_path: Path) -> None:
    save(new_attempt(tmp_path), make_state(), recall=None)
    assert best_checkpoint(tmp_path / "checkpoints") is None


def test_metrics_that_are_no_numbers_do_no_harm(tmp_path: Path) -> None:
    checkpoint = save(new_attempt(tmp_path), make_state(), recall=float("nan"))
    assert latest_checkpoint(tmp_path / "checkpoints") == checkpoint


def test_a_replaced_attempt_commits_and_removes_nothing(tmp_path: Path) -> None:
    old, state = new_attempt(tmp_path), make_state()
    first = save(old, state)
    new_attempt(tmp_path)
    state.step = 1
    with pytest.raises(StaleAttemptError):
        save(old, state, keep=1)
    assert list_checkpoints(tmp_path / "checkpoints") == [first]


def test_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = save(new_attempt(tmp_path), make_state())
    model = Clue(ClueConfig(dim=16, num_heads=2), vocab_size=30)
    other = TrainState(model=model, optimizer=build_optimizer(model, OPTIM))
    with pytest.raises(CheckpointMismatchError, match="does not fit"):
        restore_checkpoint(checkpoint, other)


def test_a_restored_state_does_not_depend_on_its_files(tmp_path: Path) -> None:
    state = make_state(torch.float32)
    run_steps(state, 1, 2)
    checkpoint = save(new_attempt(tmp_path), state)
    restored = make_state(torch.float32)
    restore_checkpoint(checkpoint, restored)
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        with (checkpoint / name).open("r+b") as stream:  # in place, which a mapped file would show
            stream.write(bytes((checkpoint / name).stat().st_size))
    run_steps(restored, 2, 2)
    run_steps(state, 2, 2)
    for name, value in weights(restored).items():
        assert torch.equal(value, weights(state)[name]), name


def test_a_run_with_adagrad_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = OPTIM.model_copy(update={"algorithm": "adagrad"})

    def new_state() -> TrainState[Clue]:
        state = make_state()
        return TrainState(model=state.model, optimizer=build_optimizer(state.model, config), seed=state.seed)

    whole, begun, resumed = new_state(), new_state(), new_state()
    assert isinstance(whole.optimizer, torch.optim.Adagrad)
    run_steps(whole, 4, 4)
    run_steps(begun, 2, 4)
    restore_checkpoint(save(new_attempt(tmp_path), begun), resumed)
    run_steps(resumed, 4, 4)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert not torch.equal(weights(begun)["token_embedding.weight"], weights(whole)["token_embedding.weight"])
