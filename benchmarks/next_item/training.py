"""Training of the rivals that are trained: Adam, and the epoch with the best validation NDCG@10 counts."""

import copy
import time
from collections.abc import Callable
from itertools import product
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.next_item.data_set import DataSet
from benchmarks.next_item.system import Outcome, rank_both, rank_held
from userrep.data.leave_one_out import Sequences

MAX_ITEMS = 20  # most recent ones of a history
BATCH_SIZE = 64  # sequences
POOL_BATCHES = 8
MAX_EPOCHS = 200
PATIENCE = 8  # epochs without a better validation NDCG@10 after which training ends
GRID = tuple(
    {"dim": dim, "dropout": dropout, "learning_rate": rate}
    for dim, dropout, rate in product((64, 128), (0.2, 0.5), (1e-3, 3e-3))
)


class SequenceModel(nn.Module):
    """A model of rows of 1 + item, oldest first, 0 behind their ends."""

    def loss(self, items_BL: Tensor) -> Tensor:
        """Mean loss of training sequences of two items or more, scalar."""
        raise NotImplementedError

    def scores(self, items_BL: Tensor) -> Tensor:
        """Score of every item as the next one, (B, I)."""
        raise NotImplementedError


class Progress(Protocol):
    """Is told of every epoch."""

    def __call__(self, epoch: int, loss: float, validation_ndcg: float) -> None:
        """Epoch from 1, its mean training loss, the NDCG@10 after it."""
        ...


def fit(
    make: Callable[[], SequenceModel],
    data: DataSet,
    learning_rate: float,
    seed: int,
    max_epochs: int = MAX_EPOCHS,
    patience: int = PATIENCE,
    progress: Progress | None = None,
) -> Outcome:
    """Trains a model, and ranks with the weights of its best epoch.

    Args:
        make: builds the model; its initial weights are random.
        data: the set.
        learning_rate: of Adam, constant.
        seed: of weights, batches, dropout and masks.
        max_epochs: >= 1.
        patience: epochs without a better validation NDCG@10 after which training ends.
        progress: default: nobody is told.

    Raises:
        ValueError: no training user has two events, or the loss is not finite.
    """
    sequences = data.split.train.take(data.train_users).recent(1 + MAX_ITEMS)
    sequences = sequences.take(np.flatnonzero(sequences.lengths >= 2))
    if not len(sequences):
        raise ValueError("no training user has two events, and the next item needs one before it: take a larger share")
    started, rng = time.perf_counter(), np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
        best_ndcg, best_epoch, best_state, epoch = -1.0, 0, model.state_dict(), 0
        while epoch < max_epochs and epoch - best_epoch < patience:
            epoch += 1
            loss = _train_epoch(model, optimizer, sequences, rng)
            validation = rank_held(data, scorer(model), "validation").values()["ndcg_at_10"].mean()
            if validation > best_ndcg:
                best_ndcg, best_epoch, best_state = float(validation), epoch, copy.deepcopy(model.state_dict())
            if progress is not None:
                progress(epoch, loss, float(validation))
    model.load_state_dict(best_state)
    facts = {"epochs": float(epoch), "best_epoch": float(best_epoch), "seconds": time.perf_counter() - started}
    return rank_both(data, scorer(model), facts)


def scorer(model: SequenceModel) -> Callable[[Sequences], np.ndarray]:
    """The scores of a model as `rank_both` asks for them."""

    @torch.no_grad()
    def scores(histories: Sequences) -> np.ndarray:
        model.eval()
        shown = histories.recent(MAX_ITEMS)
        order = np.argsort(shown.lengths, kind="stable")
        parts = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
        scores_BI = torch.cat([model.scores(_rows(shown.take(part))) for part in parts])
        return scores_BI[torch.from_numpy(np.argsort(order))].numpy()

    return scores


def deal_batches(lengths: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Every sequence once, in random batches of sequences about as long as each other.

    Sequences are sorted by length within random pools of `POOL_BATCHES` batches; padding is then a few percent.

    Args:
        lengths: of the sequences, (N,).
        rng: of the order.
    """
    order, batches = rng.permutation(len(lengths)), []
    for start in range(0, len(order), POOL_BATCHES * BATCH_SIZE):
        pool = order[start : start + POOL_BATCHES * BATCH_SIZE]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[first : first + BATCH_SIZE] for first in range(0, len(pool), BATCH_SIZE)]
    return [batches[number] for number in rng.permutation(len(batches))]


def _train_epoch(
    model: SequenceModel, optimizer: torch.optim.Optimizer, sequences: Sequences, rng: np.random.Generator
) -> float:
    """Every sequence once, in random order. Returns the mean loss of the steps."""
    model.train()
    losses = []
    for batch in deal_batches(sequences.lengths, rng):
        loss = model.loss(_rows(sequences.take(batch)))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()}: lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def _rows(sequences: Sequences) -> Tensor:
    return torch.from_numpy(sequences.padded(int(sequences.lengths.max())))
