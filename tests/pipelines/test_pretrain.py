"""What the pretrain stage says about the speed of a run, from its spool."""

from pathlib import Path

import pytest

from pipelines.pretrain import training_speed
from userrep.training.tracking import MetricSpool


def write_spool(path: Path, points: list[tuple[int, float, float]]) -> Path:
    """Points of (step, seconds of waiting, seconds of the step)."""
    spool = MetricSpool(path)
    for step, wait_s, step_s in points:
        spool.write(step, 0, {"time/input_wait_s": wait_s, "time/step_s": step_s, "train/loss": 1.0})
    spool.close()
    return path


def test_the_wait_of_every_start_is_left_out(tmp_path: Path):
    first = [(1, 9.0, 0.7), (2, 0.1, 0.4), (3, 0.2, 0.4), (4, 0.1, 0.4)]
    resumed = [(3, 8.0, 0.4), (4, 0.3, 0.4), (5, 0.1, 0.4)]  # from a checkpoint at step 2
    after_a_gap = [(8, 7.0, 0.4), (9, 0.4, 0.4)]  # the points of steps 6 and 7 were lost with their machine
    speed = training_speed(write_spool(tmp_path / "spool", first + resumed + after_a_gap), 64)
    assert speed["users_per_s"] == pytest.approx(64 / 0.4)
    assert speed["input_wait_fraction"] == pytest.approx(1.2 / (1.2 + 6 * 0.4), abs=1e-4)


def test_a_single_step_has_no_known_wait(tmp_path: Path):
    speed = training_speed(write_spool(tmp_path / "spool", [(1, 9.0, 0.5)]), 10)
    assert speed == {"users_per_s": 20.0, "input_wait_fraction": 0.0}
