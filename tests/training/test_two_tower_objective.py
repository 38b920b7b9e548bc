"""The objective against oracles, on two workers, and the effect of each of its parts."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.contrastive import one_direction_oracle
from tests.support.distributed import run_ranks
from tests.support.two_tower import INFORMATION, make_batch, make_items, make_model
from userrep.data.batch import UserBatch
from userrep.data.feature_views import draw_items, draw_views
from userrep.data.features import ItemFeatures
from userrep.models.two_tower import TwoTower
from userrep.training.two_tower_encoding import as_values, encode_rows
from userrep.training.two_tower_objective import VARIANTS, TwoTowerLossConfig, TwoTowerObjective, variant

ITEMS = make_items()


def objective(model: TwoTower, seed: int = 4, **changes: Any) -> TwoTowerObjective:
    loss = TwoTowerLossConfig.parse({"regulariser": "none", "tile_size": 5, **changes})
    return TwoTowerObjective(model, ITEMS, INFORMATION, loss, seed)


def main_vectors(model: TwoTower, batch: UserBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of the queries and of the next items, item by item."""
    queries, items = [], []
    for number in range(2 * len(batch.user_keys)):
        last = batch.history_items[batch.history_offsets[number + 1] - 1]
        row = ITEMS.rows(batch.item_keys[last : last + 1])
        embedded = model.embed(as_values([f.take(row) for f in ITEMS.features], torch.device("cpu")))
        if number < len(batch.user_keys):
            queries.append(model.encode_queries(embedded))
        else:
            items.append(model.encode_items(embedded))
    return torch.cat(queries), torch.cat(items)


def expected_main(
    model: TwoTower, batch: UserBatch, keys: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    query, item = main_vectors(model, batch)
    groups, column_bias = torch.zeros(len(keys), dtype=torch.int64), torch.zeros(len(keys)) if bias is None else bias
    return one_direction_oracle(query, item, model.logit_scale, column_bias, (keys,), groups)


def test_main_loss_leaves_out_other_samples_of_the_same_next_item() -> None:
    model, batch = make_model(ITEMS), make_batch()
    keys = torch.from_numpy(batch.positive_item_keys)
    assert len(keys.unique()) < len(keys)
    masked, facts = objective(model)(batch)
    unmasked, all_facts = objective(model, masks_shared_items=False)(batch)
    torch.testing.assert_close(masked, expected_main(model, batch, keys))
    torch.testing.assert_close(unmasked, expected_main(model, batch, torch.arange(len(keys))))
    assert masked < unmasked
    assert facts["train/negatives"] < all_facts["train/negatives"] == len(keys) - 1


def test_frequency_correction_is_that_of_the_batches_up_to_this_one() -> None:
    model = make_model(ITEMS)
    corrected = objective(model, corrects_frequency=True)
    for step in range(6):
        corrected(make_batch(step=step))
    batch = make_batch(step=6)
    loss = corrected(batch)[0]
    keys = torch.from_numpy(batch.positive_item_keys)
    bias = -model.frequency.log_probabilities(keys)
    torch.testing.assert_close(loss, expected_main(model, batch, keys, bias))
    assert bias.max() > bias.min() + 1
    before = model.frequency.gap.clone()
    corrected.eval()(make_batch(step=7))
    assert torch.equal(model.frequency.gap, before)


def test_frequency_correction_makes_popular_items_score_higher() -> None:
    gaps = []
    for corrects in (False, True):
        model = make_model(ITEMS, hidden_dims=[6])
        form = objective(model, corrects_frequency=corrects)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for step in range(150):
            optimizer.zero_grad()
            form(make_batch(size=12, step=step))[0].backward()
            optimizer.step()
        counts = np.zeros(len(ITEMS))
        for step in range(150):
            np.add.at(counts, ITEMS.rows(make_batch(size=12, step=step).positive_item_keys), 1)
        rows = np.arange(len(ITEMS))
        scores = encode_rows(model, ITEMS, rows, as_queries=True) @ encode_rows(model, ITEMS, rows).T
        popular = np.argsort(-counts)[:5]
        gaps.append(scores[:, popular].mean() - scores.mean())
    # In-batch negatives are popular ones, so that without a correction scores tell P(item | query) / P(item); with it
    # they tell P(item | query), which is higher for popular items.
    assert gaps[1] > gaps[0] + 0.1


def test_frequencies_are_part_of_a_checkpoint() -> None:
    losses = []
    for resumes in (False, True):
        model = make_model(ITEMS)
        form = objective(model, corrects_frequency=True)
        for step in range(5):
            if resumes and step == 3:
                saved, model = model.state_dict(), make_model(ITEMS)
                model.load_state_dict(saved)
                form = objective(model, corrects_frequency=True)
            loss = form(make_batch(step=step))[0]
        losses.append(loss)
    assert torch.equal(losses[0], losses[1])


def regulariser_of(form: TwoTowerObjective, batch: UserBatch) -> float:
    return form(batch)[1]["train/regulariser"]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("plain", "fd", "so")])
def test_self_supervised_loss_compares_two_views_of_items_of_the_corpus(name: str) -> None:
    model, batch = make_model(ITEMS), make_batch()
    loss = variant(name, TwoTowerLossConfig(alpha=0.7, corpus_batch_size=20, regulariser_temperature=0.5))
    form = TwoTowerObjective(model, ITEMS, INFORMATION, loss, seed=4)
    total, facts = form(batch)
    rows = draw_items(len(ITEMS), 20, 4, batch.step)
    views = draw_views(ITEMS, rows, np.arange(20), INFORMATION, loss.augmentation, 4, batch.step)
    first, second = (model.encode_items(model.embed(as_values(view, torch.device("cpu")))) for view in views)
    keys, groups = torch.from_numpy(ITEMS.keys[rows].view(np.int64)), torch.zeros(20, dtype=torch.int64)
    assert len(keys.unique()) < 20
    scale = -torch.tensor(0.5, dtype=torch.float64).log()
    expected = one_direction_oracle(first, second, scale, torch.zeros(20), (keys,), groups)
    assert facts["train/regulariser"] == pytest.approx(expected.item(), rel=1e-9)
    main = expected_main(model, batch, torch.from_numpy(batch.positive_item_keys))
    torch.testing.assert_close(total, main + 0.7 * expected)


def test_without_masks_and_dropout_views_are_equal_and_masks_make_them_differ() -> None:
    model, batch = make_model(ITEMS), make_batch()
    changes = {"regulariser": "self_supervised", "corpus_batch_size": 20}
    same = regulariser_of(objective(model, **changes, augmentation={"masking": "none", "value_dropout": 0}), batch)
    spread = regulariser_of(objective(model, **{**changes, "regulariser": "spread_out"}), batch)
    assert same == pytest.approx(spread, rel=1e-9)
    for augmentation in ({"masking": "none", "value_dropout": 0.5}, {"masking": "rfm", "value_dropout": 0}):
        assert regulariser_of(objective(model, **changes, augmentation=augmentation), batch) > same


def test_orthogonal_regulariser_is_of_whole_items() -> None:
    model = make_model(ITEMS)
    form = objective(model, regulariser="orthogonal", corpus_batch_size=20)
    rows = draw_items(len(ITEMS), 20, 4, 3)
    vectors = torch.from_numpy(encode_rows(model, ITEMS, rows)).double()
    pairs = (vectors @ vectors.T)[~torch.eye(20, dtype=torch.bool)]
    expected = pairs.mean() ** 2 + F.relu(pairs.square().mean() - 1 / 6)
    assert regulariser_of(form, make_batch()) == pytest.approx(expected.item(), rel=1e-4)


def test_feature_dropout_is_of_training_and_of_items_alone() -> None:
    model, batch = make_model(ITEMS), make_batch()
    plain, dropped = objective(model), objective(model, feature_dropout=0.5)
    assert not torch.allclose(plain(batch)[0], dropped(batch)[0])
    assert torch.equal(plain.eval()(batch)[0], dropped.eval()(batch)[0])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for form in (plain.train(), dropped.train()):
        vectors = {}
        model.query_tower.register_forward_hook(lambda _, given, out, v=vectors: v.update(query=given[0]))
        model.item_tower.register_forward_hook(lambda _, given, out, v=vectors: v.update(item=given[0]))
        form(batch)
        seen.append((vectors["query"], vectors["item"]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])


def _on_rank(rank: int, world: list[slice], forms: dict[str, dict[str, Any]]) -> Any:
    return {name: run_steps(changes, world[rank]) for name, changes in forms.items()}


def run_steps(changes: dict[str, Any], part: slice) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps, and the gradient of the last one."""
    model = make_model(ITEMS)
    form, losses = objective(model, **changes), []
    for step in range(3):
        model.zero_grad()
        loss, _ = form(make_batch(size=13, step=step, start=part.start, stop=part.stop))
        loss.backward()
        losses.append(loss.item())
    # A gradient of every parameter, without which data parallelism waits forever.
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return losses, gradients  # pyright: ignore


def test_two_workers_train_as_one_does() -> None:
    forms: dict[str, dict[str, Any]] = {name: variant(name).model_dump(mode="json") for name in VARIANTS}
    forms["everything"] = forms["cfm"] | {"corrects_frequency": True, "feature_dropout": 0.4, "corpus_batch_size": 9}
    forms["unmasked"] = forms["plain"] | {"masks_shared_items": False}
    forms["orthogonal"] = {"regulariser": "orthogonal"}
    parts = run_ranks(_on_rank, 2, [slice(0, 6), slice(6, 13)], forms)
    for name, changes in forms.items():
        losses, gradients = run_steps(changes, slice(0, 13))
        np.testing.assert_allclose(np.mean([part[name][0] for part in parts], axis=0), losses, rtol=1e-10)
        for parameter, gradient in gradients.items():
            mean = torch.stack([part[name][1][parameter] for part in parts]).mean(dim=0)
            torch.testing.assert_close(mean, gradient, rtol=1e-8, atol=1e-12)


def test_steps_and_seeds_draw_anew() -> None:
    model = make_model(ITEMS)
    first = make_batch()
    changes = {"regulariser": "self_supervised"}
    values = {regulariser_of(objective(model, seed, **changes), first) for seed in (0, 1, 2)}
    assert len(values) == 3
    assert regulariser_of(objective(model, 0, **changes), first) in values


def test_vectors_of_rows_are_those_of_the_towers() -> None:
    model, rows = make_model(ITEMS), np.array([4, 0, 4])
    for as_queries in (True, False):
        vectors = encode_rows(model, ITEMS, rows, as_queries)
        assert np.array_equal(vectors[0], vectors[2])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert encode_rows(model, ITEMS, rows[:0]).shape == (0, 6)


def test_what_cannot_be_is_refused() -> None:
    model, batch = make_model(ITEMS), make_batch()
    with pytest.raises(ValueError, match="no variant 'best'"):
        variant("best")
    few = ItemFeatures(ITEMS.keys[:2], ITEMS.vocabularies, tuple(f.take(np.arange(2)) for f in ITEMS.features))
    with pytest.raises(ValueError, match="are not among the 2 with features"):
        TwoTowerObjective(model, few, INFORMATION)(batch)
