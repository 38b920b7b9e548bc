"""Embedded features and towers against loops."""

import pytest
import torch
import torch.nn.functional as F

from userrep.models.two_tower import FeatureEmbedding, FeatureTable, TwoTower, TwoTowerConfig, Values

TABLES = (FeatureTable(7, 3), FeatureTable(5, 4), FeatureTable(0, 9))
CONFIG = TwoTowerConfig(hidden_dims=(6, 4))


def make_values() -> tuple[Values, ...]:
    """Three items; the second one lacks the middle feature, the last one the dense one."""
    return (
        (torch.tensor([6, 0, 0]), torch.tensor([0, 1, 2, 3])),
        (torch.tensor([1, 4, 2]), torch.tensor([0, 2, 2, 3])),
        (torch.tensor([0.5, -2.0]), torch.tensor([0, 1, 2, 2])),
    )


def naive_embedding(embedding: FeatureEmbedding, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    rows = []
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        found = values[start:stop]
        if not len(found):
            rows.append(embedding.default)
        elif embedding.values is None:
            rows.append(found.to(embedding.default.dtype))
        else:
            rows.append(embedding.values.weight[found].mean(dim=0))
    return torch.stack(rows)


def make_model(config: TwoTowerConfig = CONFIG) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(config, TABLES).double()


def test_towers_equal_a_loop_over_items_and_values() -> None:
    model = make_model()
    for encode, tower in ((model.encode_queries, model.query_tower), (model.encode_items, model.item_tower)):
        results = []
        for is_naive in (True, False):
            model.zero_grad()
            if is_naive:
                embedded = [naive_embedding(e, *v) for e, v in zip(model.embeddings, make_values(), strict=True)]
                first, second = tower[0], tower[2]
                hidden = F.relu(first(torch.cat(embedded, dim=1)))
                vectors = F.normalize(second(hidden), dim=-1)
            else:
                vectors = encode(model.embed(make_values()))
            (vectors * torch.arange(12.0).double().view(3, 4)).sum().backward()
            results.append(
                (
                    vectors.detach(),
                    [p.grad for p in model.embeddings.parameters() if p.grad is not None and p.grad.any()],
                )
            )
        torch.testing.assert_close(results[0], results[1])


def test_a_masked_feature_is_its_default_whatever_the_item() -> None:
    model = make_model()
    masked = [(values[:0], torch.zeros_like(offsets)) for values, offsets in make_values()]
    vectors = model.encode_items(model.embed(masked))
    torch.testing.assert_close(vectors, vectors[:1].expand(3, -1))
    vectors.sum().backward()
    for embedding in model.embeddings:
        assert embedding.default.grad.any()
        # A gradient, if of zeros: data parallelism waits for one of every parameter.
        assert embedding.values is None or not embedding.values.weight.grad.any()


def test_towers_are_apart_unless_shared() -> None:
    apart, shared = make_model(), make_model(TwoTowerConfig(hidden_dims=(6, 4), shares_towers=True))
    for model, is_shared in ((apart, False), (shared, True)):
        embedded = model.embed(make_values())
        assert torch.equal(model.encode_queries(embedded), model.encode_items(embedded)) == is_shared


@pytest.mark.parametrize("learns", [False, True])
def test_the_temperature_learns_where_it_is_told_to(learns: bool) -> None:
    model = make_model(TwoTowerConfig(temperature=0.2, learns_temperature=learns))
    assert model.logit_scale.exp().item() == pytest.approx(5)
    assert model.logit_scale.requires_grad == learns


def test_a_model_without_features_is_refused() -> None:
    with pytest.raises(ValueError, match="without features"):
        TwoTower(CONFIG, ())
