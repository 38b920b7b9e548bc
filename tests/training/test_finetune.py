"""The two stages, their loss and their schedule; a planted rule is learned; what is drawn decides, nothing else."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from tests.support.pretrained import shake
from userrep.config import ConfigError
from userrep.data.leave_one_out import LeaveOneOut, Sequences
from userrep.data.next_item_samples import SequenceReader
from userrep.losses import masked_lm
from userrep.models.recformer import Recformer, RecformerConfig
from userrep.training import finetune as module
from userrep.training.encoding import MemoryConfig
from userrep.training.finetune import (
    Epoch,
    FinetuneConfig,
    StageConfig,
    finetune,
    next_item_loss,
    open_reader,
    rate_factor,
)
from userrep.training.finetune_evaluation import encode_items, evaluate
from userrep.training.state import NonFiniteLossError

NUM_ITEMS, NUM_USERS, CLS = 12, 60, 12
MODEL = RecformerConfig(
    dim=16, num_layers=1, num_heads=2, mlp_dim=32, window=4, max_items=4, max_tokens=8, temperature=0.1
)
CONFIG = FinetuneConfig(
    moving=StageConfig(max_epochs=3, patience=3),
    frozen=StageConfig(max_epochs=3, patience=3),
    batch_size=16,
    learning_rate=3e-3,
    warmup_steps=2,
    min_steps=1,
)


def planted_data(num_users: int = NUM_USERS) -> LeaveOneOut:
    """Item n is followed by n + 1, around a circle; every item has a token of its own."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 9, num_users)
    starts = rng.integers(0, NUM_ITEMS, num_users)
    events = [(start + np.arange(length)) % NUM_ITEMS for start, length in zip(starts, lengths, strict=True)]
    return LeaveOneOut(
        user_ids=pa.array([f"user {number}" for number in range(num_users)]),
        keys=np.sort(rng.integers(0, 2**63, num_users)).astype(np.uint64),
        events=Sequences(np.concatenate(events).astype(np.int32), np.append(0, np.cumsum(lengths))),
        item_ids=pa.array([f"{number:02}" for number in range(NUM_ITEMS)]),
        tokens=np.arange(NUM_ITEMS, dtype=np.int32),
        token_offsets=np.arange(NUM_ITEMS + 1),
    )


def make_model(dtype: torch.dtype = torch.float32) -> Recformer:
    torch.manual_seed(0)
    model = Recformer(MODEL, NUM_ITEMS + 2).to(dtype)
    shake(model)
    return model


def make_reader(config: FinetuneConfig = CONFIG) -> SequenceReader:
    return open_reader(planted_data(), MODEL, CLS, config)


class Spy:
    """Keeps the item matrix of every step, and every rate."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.matrices: list[torch.Tensor] = []
        self.rates: list[float] = []
        original_loss, original_rate = module.next_item_loss, module.rate_factor

        def loss(user: torch.Tensor, item: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            self.matrices.append(item.clone())
            return original_loss(user, item, *rest)

        def rate(*arguments: int) -> float:
            self.rates.append(original_rate(*arguments))
            return self.rates[-1]

        patch.setattr(module, "next_item_loss", loss)
        patch.setattr(module, "rate_factor", rate)


def mean_ndcg(model: Recformer, item_ID: torch.Tensor, reader: SequenceReader) -> float:
    return float(evaluate(model, item_ID, reader, "validation")["ndcg_at_10"].mean())


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 23 * 3, 2**20])
def test_loss_and_gradient_are_those_of_the_whole_softmax(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_lm, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    raw_BD = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    item_ID, targets_B = F.normalize(torch.randn(23, 5, dtype=torch.float64), dim=-1), torch.randint(0, 23, (7,))
    scale = -torch.tensor(0.05, dtype=torch.float64).log()
    loss = next_item_loss(F.normalize(raw_BD, dim=-1), item_ID, scale, targets_B)
    expected = F.cross_entropy(F.normalize(raw_BD, dim=-1) @ item_ID.T / 0.05, targets_B)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    (mine,), (theirs,) = torch.autograd.grad(loss, raw_BD), torch.autograd.grad(expected, raw_BD)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 100), (7, 0), (40, 100), (200, 10)])
def test_rate_rises_then_falls_and_is_never_zero(num_steps: int, warmup: int) -> None:
    rates = [rate_factor(step, num_steps, warmup) for step in range(num_steps)]
    peak = rates.index(1.0)
    assert min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert peak == min(warmup, num_steps // 2)


def test_planted_rule_is_learned() -> None:
    config = CONFIG.model_copy(
        update={
            "moving": StageConfig(max_epochs=5, patience=5),
            "frozen": StageConfig(max_epochs=10, patience=10),
            "learning_rate": 1e-2,
            "batch_size": 8,
            "evaluate_every": 5,
        }
    )
    model, reader = make_model(), make_reader()
    before = evaluate(model, encode_items(model, reader), reader, "test")
    done = finetune(model, reader, config)
    after = evaluate(model, done.item_matrix, reader, "test")
    assert before["mrr"].mean() < 0.5
    assert after["mrr"].mean() > 0.9
    losses = [epoch.loss for epoch in done.epochs if epoch.loss is not None]
    assert losses[-1] < 0.5 * losses[0]


def test_items_move_every_epoch_of_the_first_stage_and_stay_throughout_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy, model, reader = Spy(monkeypatch), make_model(), make_reader()
    start_ID = encode_items(model, reader)
    done = finetune(model, reader, CONFIG)
    per_epoch = -(-NUM_USERS // CONFIG.batch_size)
    assert len(spy.matrices) == 6 * per_epoch
    epochs = [spy.matrices[first : first + per_epoch] for first in range(0, len(spy.matrices), per_epoch)]
    assert all(torch.equal(epoch[0], matrix) for epoch in epochs for matrix in epoch)
    assert torch.equal(epochs[0][0], start_ID)
    assert not torch.equal(epochs[1][0], epochs[0][0])
    assert not torch.equal(epochs[2][0], epochs[1][0])
    best = max((epoch for epoch in done.epochs if epoch.stage != "frozen"), key=lambda epoch: epoch.ndcg_at_10)
    frozen_ID = epochs[max(best.number, 1) - 1][0]
    assert all(torch.equal(epoch[0], frozen_ID) for epoch in epochs[3:])
    assert torch.equal(done.item_matrix, frozen_ID)
    assert spy.rates[3 * per_epoch] == pytest.approx(spy.rates[0])  # the second stage warms up again
    assert min(spy.rates) > 0


@pytest.mark.parametrize("stages", [("moving",), ("frozen",), ("moving", "frozen")])
def test_best_model_is_loaded_with_its_matrix(stages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # The second half of a stage ruins the model.
    monkeypatch.setattr(module, "rate_factor", lambda step, num_steps, _: 1.0 if 2 * step < num_steps else 1e4)
    chosen = {name: StageConfig(max_epochs=4, patience=4) if name in stages else None for name in ("moving", "frozen")}
    config = CONFIG.model_copy(update={**chosen, "learning_rate": 1e-2})
    model, reader = make_model(), make_reader()
    done = finetune(model, reader, config)
    scores = [epoch.ndcg_at_10 for epoch in done.epochs]
    assert {epoch.stage for epoch in done.epochs} == {"pretrained", *stages}
    assert scores[0] < max(scores)
    assert scores[-1] < max(scores)
    assert [epoch.is_best for epoch in done.epochs] == [
        all(score > before for before in scores[:place]) for place, score in enumerate(scores)
    ]
    assert mean_ndcg(model, done.item_matrix, reader) == pytest.approx(max(scores), abs=1e-9)


def test_a_stage_ends_after_so_many_evaluations_without_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"moving": StageConfig(max_epochs=50, patience=4), "evaluate_every": 2})
    scores = iter([0.5, 0.1, 0.6, 0.1, 0.6, 0.2, 0.3, 0.1, 0.7])
    constant = lambda *_: {"ndcg_at_10": np.array([next(scores)])}  # noqa: E731
    monkeypatch.setattr(module, "evaluate", constant)
    heard: list[Epoch] = []
    finetune(make_model(), make_reader(), config, heard.append)
    assert [(epoch.stage, epoch.number) for epoch in heard] == [
        ("pretrained", 0),
        *(("moving", number) for number in (2, 4, 6, 8, 10, 12)),
        ("frozen", 2),
        ("frozen", 3),  # the last one of a stage is always asked
    ]
    assert [epoch.number for epoch in heard if epoch.is_best] == [0, 4, 3]


def test_without_stages_the_model_is_what_it_was() -> None:
    config, model = CONFIG.model_copy(update={"moving": None, "frozen": None}), make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reader = make_reader()
    done = finetune(model, reader, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(done.item_matrix, encode_items(model, reader))
    assert [epoch.ndcg_at_10 for epoch in done.epochs] == [mean_ndcg(model, done.item_matrix, reader)]
    assert config.is_zero_shot
    assert done.num_train_users == 0


def test_a_run_repeats_for_its_seed_and_does_not_depend_on_memory() -> None:
    def run(seed: int, memory: MemoryConfig | None = None) -> torch.Tensor:
        model = make_model(torch.float64)
        finetune(model, make_reader(), CONFIG.model_copy(update={"seed": seed}), memory=memory)
        return torch.cat([value.flatten() for value in model.state_dict().values()])

    first = run(1)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    torch.testing.assert_close(run(1, MemoryConfig(budget_mib=64, chunk_size=20)), first, rtol=0, atol=1e-9)


def test_frozen_token_embeddings_stay_and_everything_else_moves() -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    finetune(model, make_reader(), CONFIG.model_copy(update={"freeze_token_embeddings": True}))
    unchanged = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert "token_embedding.weight" in unchanged
    others = {"position_embedding.weight", "layers.0.query_global.weight", "layers.0.mlp_in.weight"}
    assert not others & unchanged


def test_an_epoch_of_few_users_is_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.model_copy(update={"share": 0.1, "min_steps": 5, "frozen": None})
    spy = Spy(monkeypatch)
    done = finetune(make_model(), make_reader(config), config)
    assert done.num_train_users == 6
    assert len(spy.matrices) == 3 * 5


def test_divergence_and_limits_are_errors_that_say_what_to_do() -> None:
    with pytest.raises(NonFiniteLossError, match=r"moving, epoch 1, step \d: .*lower finetune\.learning_rate"):
        finetune(make_model(), make_reader(), CONFIG.model_copy(update={"learning_rate": 1e30}))
    for name in ("max_items", "max_tokens"):
        with pytest.raises(ConfigError, match=rf"finetune\.{name}=100.*lower it"):
            open_reader(planted_data(), MODEL, CLS, CONFIG.model_copy(update={name: 100}))
