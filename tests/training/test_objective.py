"""The objective against the oracle losses on the vectors of its encoder; what it reports about a batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.contrastive import info_nce_oracle, sigmoid_oracle
from userrep.data.batch import UserBatch
from userrep.models.clue import Clue, ClueConfig
from userrep.training.encoding import MemoryConfig, encode
from userrep.training.objective import ClueObjective, LossConfig

USER_KEYS = np.array([4, 5, 6, 4, 8, 9])
PAIRS = np.array([2, 2, 3, 3, 3, 2])
ITEM_KEYS = np.array([1, 1, 7, 7, 5, 5, 3, 3, 9, 9])  # so that some positives end with the same item


def make_batch() -> UserBatch:
    """Six users with histories of one or two of ten items of three tokens."""
    rng = np.random.default_rng(0)
    lengths = np.tile([1, 2, 2], 4)
    return UserBatch(
        tokens=rng.integers(0, 40, 30).astype(np.int32),
        token_offsets=np.arange(0, 31, 3).astype(np.int32),
        history_items=rng.integers(0, 10, lengths.sum()).astype(np.int32),
        history_offsets=np.concatenate(([0], lengths.cumsum())).astype(np.int32),
        user_keys=USER_KEYS,
        service_pairs=PAIRS,
        item_keys=ITEM_KEYS,
        step=0,
    )


def make_model() -> Clue:
    torch.manual_seed(0)
    return Clue(ClueConfig(dim=8, num_heads=2), vocab_size=40)


@pytest.mark.parametrize("form", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("negatives", ["service_pair", "batch"])
@pytest.mark.parametrize("mask_shared_items", [False, True])
def test_loss_is_that_of_the_configured_pairs(form: str, negatives: str, mask_shared_items: bool) -> None:
    model = make_model().double()
    config = LossConfig.parse({"form": form, "negatives": negatives, "mask_shared_items": mask_shared_items})
    loss, _ = ClueObjective(model, loss=config)(make_batch())
    anchor, positive = encode(model, make_batch()).chunk(2)
    batch = make_batch()
    ends = [int(batch.history_offsets[history + 1]) - 1 for history in range(6, 12)]
    last_items = torch.from_numpy(ITEM_KEYS[batch.history_items[ends]])
    assert len(last_items.unique()) < 6, "some rows share an item, or masking would change nothing"
    keys = (torch.from_numpy(USER_KEYS), last_items)[: 1 + mask_shared_items]
    groups = torch.from_numpy(PAIRS if negatives == "service_pair" else np.zeros(6, dtype=np.int64))
    oracle = sigmoid_oracle if form == "sigmoid" else info_nce_oracle
    expected = oracle(anchor, positive, model.logit_scale, model.logit_bias, keys, groups)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    assert (model.logit_bias.grad is not None) == (form == "sigmoid")


def test_metrics_describe_the_batch() -> None:
    batch = make_batch()
    _, facts = ClueObjective(make_model(), memory=MemoryConfig(chunk_size=4))(batch)
    # Groups {0, 1, 5} and {2, 3, 4}; no key repeats within one of them.
    assert facts["train/negatives"] == 2
    assert facts["train/unique_fraction"] == 10 / len(batch.history_items)
    assert facts["train/tokens"] == 30
    assert facts["train/chunk_size"] == 4


def test_bfloat16_is_near_float32_and_leaves_weights_and_gradients_in_float32() -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        model = make_model()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        loss, _ = ClueObjective(model, precision=precision)(make_batch())
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_first_steps_leave_the_blocks_out() -> None:
    objective = ClueObjective(make_model(), bag_steps=3)
    for step, has_gradient in ((2, False), (3, True)):
        objective.zero_grad()
        objective(replace(make_batch(), step=step))[0].backward()
        gradient = objective.model.item_transformer.blocks[0].attention_out.weight.grad
        assert (gradient is not None and bool(gradient.any())) == has_gradient
