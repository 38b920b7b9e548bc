"""Faults of files: what a bit flip and a cut do to them, and what cannot be done in locked storage."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.chaos_schedule import Fault, Kind
from pipelines.chaos_storage import can_lock_storage, damage_checkpoint, storage_lock, unlock
from tests.support.tiny_run import make_state, new_attempt, run_steps, save
from userrep.manifest import MANIFEST_NAME
from userrep.training.checkpoint import latest_checkpoint, list_checkpoints

FRACTION = st.floats(0, 1, exclude_max=True)


def fault(kind: Kind, choice: float, place: float, bit: int) -> Fault:
    return Fault(index=0, kind=kind, step=1, choice=choice, place=place, bit=bit, has_own_cluster=False)


@given(content=st.binary(min_size=1, max_size=40), choice=FRACTION, place=FRACTION, bit=st.integers(0, 7))
def test_a_flip_changes_one_bit_of_one_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, choice: float, place: float, bit: int
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    for name in "ab":
        (directory / name).write_bytes(content)
    damage_checkpoint(directory, fault("bit_flip", choice, place, bit))
    changed = [int.from_bytes((directory / name).read_bytes()) ^ int.from_bytes(content) for name in "ab"]
    assert sorted(value.bit_count() for value in changed) == [0, 1]
    assert all((directory / name).stat().st_size == len(content) for name in "ab")


@given(content=st.binary(min_size=1, max_size=40), place=FRACTION)
def test_a_cut_file_is_a_shorter_prefix(tmp_path_factory: pytest.TempPathFactory, content: bytes, place: float) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "a").write_bytes(content)
    damage_checkpoint(directory, fault("truncation", 0.0, place, 0))
    left = (directory / "a").read_bytes()
    assert len(left) < len(content)
    assert content.startswith(left)


@pytest.mark.parametrize("kind", ["bit_flip", "truncation"])
@pytest.mark.parametrize("choice", [0.3, 0.6, 0.9])  # model, optimizer, state: files with a checksum
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, kind: Kind, choice: float, place: float) -> None:
    attempt, state = new_attempt(tmp_path), make_state(torch.float32)
    for step in (1, 2):
        run_steps(state, step, 2)
        save(attempt, state, recall=step / 10)
    older, newer = list_checkpoints(tmp_path / "checkpoints")
    file, _ = damage_checkpoint(newer, fault(kind, choice, place, 3))
    assert file.parent == newer
    assert file.name != MANIFEST_NAME
    with pytest.warns(UserWarning, match=f"checkpoint passed over: {file}"):
        assert latest_checkpoint(tmp_path / "checkpoints") == older


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    if not can_lock_storage(tmp_path):
        pytest.skip("storage cannot be locked here: root without chattr, or a file system without attributes")
    directory = tmp_path / "run"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "file").write_text("content")
    return directory


def test_nothing_can_be_changed_while_storage_is_locked(storage: Path) -> None:
    file = storage / "deep" / "file"
    with storage_lock(storage):
        for change in (
            (storage / "new").touch,
            (storage / "deep" / "new").mkdir,
            file.unlink,
            lambda: file.rename(storage / "moved"),
            lambda: file.write_text("other"),
        ):
            with pytest.raises(PermissionError):
                change()
        assert file.read_text() == "content"
    file.write_text("other")
    file.rename(storage / "moved")


def test_a_lock_is_lifted_after_an_error_and_by_hand(storage: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage_lock(storage):
        raise ZeroDivisionError
    (storage / "new").touch()
    lock = storage_lock(storage)
    lock.__enter__()  # by a process that is killed while it holds the lock
    with pytest.raises(PermissionError):
        shutil.rmtree(storage)
    unlock(storage)
    shutil.rmtree(storage)
    unlock(storage)  # nothing there: nothing to do
