"""The trained rivals learn a planted rule, and train on nothing that they are asked."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.next_item.bert4rec import Bert4Rec, draw_masks
from benchmarks.next_item.sasrec import SasRec
from benchmarks.next_item.training import BATCH_SIZE, SequenceModel, deal_batches, fit, scorer
from benchmarks.next_item.unisrec import UniSRec, text_vectors
from tests.benchmarks.next_item.planted import NUM_ITEMS, WORDS, make_data_set, planted
from userrep.data.leave_one_out import Sequences

MODELS: dict[str, Callable[[], SequenceModel]] = {
    "sasrec": lambda: SasRec(NUM_ITEMS, 16, 0.1),
    "bert4rec": lambda: Bert4Rec(NUM_ITEMS, 32, 0.0),
    "unisrec": lambda: UniSRec(torch.from_numpy(text_vectors(WORDS)), 16, 0.1),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_planted_rule_is_learned(name: str) -> None:
    rate, epochs = {"sasrec": (2e-2, 15), "bert4rec": (3e-3, 35), "unisrec": (2e-2, 15)}[name]
    outcome = fit(MODELS[name], planted(), rate, seed=0, max_epochs=epochs, patience=epochs)
    assert outcome.test.values()["mrr"].mean() > 0.9
    assert outcome.validation_ndcg > 0.9


@pytest.mark.parametrize("name", list(MODELS))
def test_a_seed_repeats_a_run_and_leaves_the_generator_alone(name: str) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (fit(MODELS[name], planted(60), 1e-3, seed, max_epochs=2) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(one.test.num_higher, same.test.num_higher)
    assert (one.test.num_higher != other.test.num_higher).any()


@pytest.mark.parametrize("name", list(MODELS))
def test_held_out_events_and_other_users_are_not_trained_on(name: str) -> None:
    data = planted(60)
    data = replace(data, train_users=np.arange(0, 60, 2))
    items = data.split.events.items.copy()
    lengths = data.split.events.lengths
    is_held = np.concatenate([np.arange(n) >= (n - 2 if user % 2 == 0 else 0) for user, n in enumerate(lengths)])
    items[is_held] = (items[is_held] + 5) % NUM_ITEMS
    changed = replace(data, split=replace(data.split, events=Sequences(items, data.split.events.offsets)))
    losses: list[list[float]] = []
    for given in (data, changed):
        losses.append([])
        fit(MODELS[name], given, 1e-3, 0, max_epochs=2, progress=lambda epoch, loss, ndcg: losses[-1].append(loss))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", list(MODELS))
def test_scores_do_not_depend_on_who_is_scored_along(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rng = np.random.default_rng(0)
    lengths = np.append(rng.integers(1, 9, 2 * BATCH_SIZE), 30)  # of the longest, the last 20 count
    histories = Sequences(rng.integers(0, NUM_ITEMS, lengths.sum()).astype(np.int32), np.append(0, lengths.cumsum()))
    together = scorer(model)(histories)
    for user in (0, 7, BATCH_SIZE, len(lengths) - 1):
        alone = scorer(model)(histories.take(np.array([user])))
        np.testing.assert_allclose(alone[0], together[user], rtol=1e-4, atol=1e-5)
    cut = histories.take(np.array([len(lengths) - 1])).recent(20)
    np.testing.assert_allclose(scorer(model)(cut)[0], together[-1], rtol=1e-4, atol=1e-5)


def test_causal_models_do_not_see_what_they_are_asked() -> None:
    torch.manual_seed(0)
    for name in ("sasrec", "unisrec"):
        model = MODELS[name]().eval()
        items = torch.randint(1, 1 + NUM_ITEMS, (3, 6))
        other = items.clone()
        other[:, 4:] = 1
        hidden, hidden_other = (model.scores(torch.where(torch.arange(6) < 4, rows, 0)) for rows in (items, other))
        assert torch.equal(hidden, hidden_other)


def test_masks_leave_no_sequence_out_and_no_padding_in() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 7, (5000,))
    items = (torch.arange(7) < lengths[:, None]).long()
    masks = draw_masks(items)
    assert masks.any(dim=1).all()
    assert not (masks & (items == 0)).any()
    long = lengths == 6
    is_last_alone = masks[long, 5] & (masks[long].sum(dim=1) == 1)
    # 0.2, and 0.8 of the draws that pick it alone: 0.4 * 0.6^5 + 0.6^6 / 6 = 0.0389; 5 standard errors
    assert abs(float(is_last_alone.float().mean()) - 0.231) < 5 * (0.231 * 0.769 / int(long.sum())) ** 0.5


def test_batches_hold_every_sequence_once_and_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(2, 21, 3000)
    batches = deal_batches(lengths, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(3000))
    assert max(map(len, batches)) == BATCH_SIZE
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.15 * lengths.sum()
    assert batches[0].tolist() != deal_batches(lengths, np.random.default_rng(2))[0].tolist()


def test_the_best_epoch_counts_and_patience_ends_training() -> None:
    seen: list[float] = []
    outcome = fit(
        MODELS["sasrec"], planted(60), 0.5, 0, patience=3, progress=lambda epoch, loss, ndcg: seen.append(ndcg)
    )
    assert outcome.validation_ndcg == pytest.approx(max(seen))
    assert outcome.facts["best_epoch"] == 1 + seen.index(max(seen))
    assert len(seen) == outcome.facts["epochs"] == outcome.facts["best_epoch"] + 3


def test_one_event_each_trains_nothing() -> None:
    data = make_data_set([[0, 1, 2]] * 3, WORDS)
    with pytest.raises(ValueError, match="no training user has two events"):
        fit(MODELS["sasrec"], data, 1e-3, 0)
