"""The running estimate against loops over batches, and what a checkpoint and a repetition do to it."""

import numpy as np
import pytest
import torch

from userrep.models.item_frequency import FrequencyConfig, ItemFrequency


def draw_batches(num_steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Item n of 20 is in a batch with probability about 1 / (n + 1), sometimes twice; keys are of either sign."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(-(2**63), 2**63, 20)
    batches = []
    for _ in range(num_steps):
        held = np.flatnonzero(rng.random(20) < 1 / np.arange(1, 21))
        batches.append(torch.from_numpy(keys[np.concatenate([held, held[:2]])]))
    return batches


def test_equals_a_loop_over_items() -> None:
    frequency = ItemFrequency(FrequencyConfig(rate=0.2))
    last, gap, batches = {}, {}, draw_batches(50)
    for step, batch in enumerate(batches):
        frequency.update(batch, step)
        for key in set(batch.tolist()):
            latest = step - last.get(key, -1)
            gap[key] = 0.8 * gap[key] + 0.2 * latest if key in gap else latest
            last[key] = step
    keys = torch.tensor(list(gap))
    expected = -torch.tensor(list(gap.values()), dtype=torch.float64).clamp(min=1).log()
    torch.testing.assert_close(frequency.log_probabilities(keys), expected, rtol=1e-12, atol=1e-12)


def test_approaches_the_probability_that_a_batch_holds_an_item() -> None:
    frequency = ItemFrequency(FrequencyConfig(rate=0.01))
    batches = draw_batches(4000)
    for step, batch in enumerate(batches):
        frequency.update(batch, step)
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, 20))
    estimated = frequency.log_probabilities(keys).exp()
    expected = 1 / torch.arange(1, 21).double()
    assert ((estimated / expected - 1).abs() < 0.35).all()


def test_a_repeated_step_changes_nothing() -> None:
    frequency, again = (ItemFrequency(FrequencyConfig()) for _ in range(2))
    for step, batch in enumerate(draw_batches(10)):
        frequency.update(batch, step)
        again.update(batch, step)
        again.update(batch.flip(0), step)
    assert torch.equal(frequency.gap, again.gap)
    assert torch.equal(frequency.last_step, again.last_step)


def test_goes_on_from_its_state() -> None:
    batches = draw_batches(30)
    whole, first, second = (ItemFrequency(FrequencyConfig()) for _ in range(3))
    for step, batch in enumerate(batches):
        whole.update(batch, step)
        if step == 14:
            second.load_state_dict(first.state_dict())
        (first if step < 14 else second).update(batch, step)
    second_keys = torch.cat(batches)
    assert torch.equal(whole.log_probabilities(second_keys), second.log_probabilities(second_keys))


def test_an_item_never_seen_is_the_rarest() -> None:
    frequency = ItemFrequency(FrequencyConfig())
    assert frequency.log_probabilities(torch.tensor([5])).tolist() == [0]
    for step in range(9):
        frequency.update(torch.tensor([1] if step else [1, 2]), step)
    common, once, never = frequency.log_probabilities(torch.tensor([1, 2, 3])).exp().tolist()
    assert common == 1
    assert never == pytest.approx(1 / 10)
    assert once == 1  # what one batch of one tells


def test_more_hash_functions_tell_colliding_items_apart() -> None:
    errors = []
    for num_hashes in (1, 4):
        frequency = ItemFrequency(FrequencyConfig(num_entries=31, num_hashes=num_hashes))
        apart = ItemFrequency(FrequencyConfig())
        batches = draw_batches(200)
        for step, batch in enumerate(batches):
            frequency.update(batch, step)
            apart.update(batch, step)
        keys = torch.cat(batches).unique()
        errors.append((frequency.log_probabilities(keys) - apart.log_probabilities(keys)).abs().mean())
    assert errors[1] < 0.5 * errors[0]
