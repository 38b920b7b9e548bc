"""The one evaluation by which all cells of a sweep are compared: same users, same candidates, same questions.

Legend: `P` users of the pool, `N` probe users, `H` histories, `D` width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from userrep.config import Config
from userrep.data.pool import load_pool
from userrep.data.probe_users import UNKNOWN, ProbeUsers, load_probe_users
from userrep.data.views import ViewConfig
from userrep.evaluation.next_item import NEXT_ITEM, NEXT_ITEM_CUTOFF, next_item
from userrep.evaluation.pool_loss import best_scale, infonce, pool_recall
from userrep.evaluation.probe import MIN_TRAIN, ProbeConfig, ProbeResult, class_frequencies, fit_probe
from userrep.losses.contrastive import MAX_LOGIT_SCALE
from userrep.manifest import read_manifest
from userrep.training.encoding import Encoder, encode

# Users whose items have vectors at a time: the more, the fewer items are encoded more than once.
ITEM_VECTORS_BYTES = 128 * 2**20


class EvaluationConfig(Config):
    """What a cell is measured on; equal for all cells of a sweep."""

    pool_size: int = Field(default=1000, ge=2)
    split: Literal["validation", "test"] = "test"  # of the pool
    num_probe_train: int = Field(default=4000, ge=1)
    num_probe_test: int = Field(default=2000, ge=1)
    probe_labels: bool = True  # every profile label that enough users have
    probe_next_item: bool = True
    probe_max_events: int = Field(default=256, ge=1)  # of a history of a probe user, the most that any cell is shown
    probe: ProbeConfig = ProbeConfig()


@dataclass(frozen=True)
class Measured:
    """Columns of `schema.RUNS`; see there."""

    loss: float
    loss_as_trained: float
    best_scale: float
    pool_size: int
    recall_at_1: float
    recall_at_10: float
    downstream_losses: dict[str, float]
    downstream_scores: dict[str, float]


@dataclass(frozen=True)
class Question:
    """What is asked of the vectors of probe users.

    Attributes:
        users: positions of the users who are asked about, (N,).
        labels: class of each, (N,).
        vectors: of the classes; None: they have none.
        k: of the share of right classes among the k best.
    """

    users: np.ndarray
    labels: np.ndarray
    vectors: np.ndarray | None = None
    k: int = 1


class CellEvaluation:
    """Loads its users once, and measures any number of encoders of one tokenizer on them. One process, no collective.

    Attributes:
        questions: of the probes, by task.
    """

    def __init__(self, shards: Path, config: EvaluationConfig, views: ViewConfig) -> None:
        """Loads the pool and the probe users.

        Args:
            shards: a committed table of tokenized shards.
            config: what is measured.
            views: whose first kind makes the pairs of the pool; its `max_events` is of no influence.

        Raises:
            IncompleteTableError: the directory holds no committed table.
            ValueError: too few users, or a label that is called as the task of the next item.
        """
        facts = read_manifest(shards).facts
        self._pool = load_pool(shards, facts["shards"], views, config.split, config.pool_size)
        self._config, self._users = config, None
        self.questions: dict[str, Question] = {}
        if config.probe_labels or config.probe_next_item:
            counts = config.num_probe_train, config.num_probe_test
            self._users = load_probe_users(shards, facts["shards"], *counts, config.probe_max_events)
            self.questions = _questions(self._users, config)

    def __len__(self) -> int:
        """Users of the pool P; fewer than the config asks for where the split has fewer."""
        return len(self._pool)

    def chance(self) -> dict[str, ProbeResult]:
        """By task, what one scores who knows how frequent the classes are, and nothing of a user.

        The probe of the next item does not know it: it starts from all candidates alike, with a loss of log C.
        """
        return {
            name: class_frequencies(*self._labels(question), k=question.k) for name, question in self.questions.items()
        }

    @torch.no_grad()
    def measure(self, model: Encoder, max_events: int) -> Measured:
        """Measures an encoder on its device; it is in evaluation mode meanwhile.

        Args:
            model: whose tokenizer is that of the shards.
            max_events: most recent events of each view, and of each history, that it is shown.

        Raises:
            ValueError: the encoder has diverged, or `max_events` is more than the probe users were loaded with.
        """
        if max_events < 1:
            raise ValueError(f"max_events is {max_events}: an encoder is shown at least one event")
        if self._users is not None and max_events > self._config.probe_max_events:
            raise ValueError(
                f"max_events is {max_events}, the probe users have {self._config.probe_max_events} events of a "
                "history: set probe_max_events to the most that any cell of the sweep is shown"
            )
        was_training = model.training
        model.eval()
        try:
            anchor_PD, positive_PD = self._encode_pool(model, max_events)
            results = self._probe(model, max_events)
        finally:
            model.train(was_training)
        best, recall = best_scale(anchor_PD, positive_PD), pool_recall(anchor_PD, positive_PD)
        scale = min(model.logit_scale.exp().item(), MAX_LOGIT_SCALE)
        return Measured(
            loss=best.loss,
            loss_as_trained=infonce(anchor_PD, positive_PD, scale),
            best_scale=best.scale,
            pool_size=len(self._pool),
            recall_at_1=recall[1],
            recall_at_10=recall[10],
            downstream_losses={name: result.loss for name, result in results.items()},
            downstream_scores={name: result.score for name, result in results.items()},
        )

    @torch.no_grad()
    def pool_loss(self, model: Encoder, max_events: int) -> float:
        """`Measured.loss` alone: a look at an encoder that goes on training."""
        was_training = model.training
        model.eval()
        try:
            return best_scale(*self._encode_pool(model, max_events)).loss
        finally:
            model.train(was_training)

    def _encode_pool(self, model: Encoder, max_events: int) -> tuple[np.ndarray, np.ndarray]:
        """Anchors and positives, float32 (P, D)."""
        pool = replace(self._pool, max_events=max_events)
        lengths = np.stack([pool.samples.anchor_lengths, pool.samples.positive_lengths])
        num_events = np.minimum(lengths, max_events).sum(axis=0)
        parts = [
            encode(model, pool.batch(start, stop)).cpu().numpy().reshape(2, stop - start, -1)
            for start, stop in _parts(num_events, model.dim)
        ]
        anchor_PD, positive_PD = np.concatenate(parts, axis=1)
        return anchor_PD, positive_PD

    def _probe(self, model: Encoder, max_events: int) -> dict[str, ProbeResult]:
        if self._users is None or not self.questions:
            return {}
        is_before = NEXT_ITEM in self.questions
        is_whole = len(self.questions) > is_before
        whole_ND, before_ND = probe_vectors(model, self._users, max_events, is_whole, is_before)
        results = dict[str, ProbeResult]()
        for name, question in self.questions.items():
            vectors_ND = (before_ND if name == NEXT_ITEM else whole_ND)[question.users]
            is_train = self._users.is_train[question.users]
            train_labels, test_labels = self._labels(question)
            parts = vectors_ND[is_train], train_labels, vectors_ND[~is_train], test_labels
            with torch.enable_grad():
                results[name] = fit_probe(*parts, self._config.probe, question.vectors, question.k)
        return results

    def _labels(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """Of training and of held-out users."""
        assert self._users is not None
        is_train = self._users.is_train[question.users]
        return question.labels[is_train], question.labels[~is_train]


@torch.no_grad()
def probe_vectors(
    model: Encoder, users: ProbeUsers, max_events: int, is_whole: bool = True, is_before: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """User vectors from whole histories, and from what came before the last event; each float32 (N, D), L2 norm 1.

    A vector is the mean of those of the user's histories, normalised, as it is published. It is zero where there is
    nothing to encode or nothing was asked for. Every item is encoded once for a part of the users, in chunks.

    Args:
        model: the encoder, on its device.
        users: of the probe.
        max_events: most recent events of a history.
        is_whole: False: the first result is zero, and nothing is spent on it.
        is_before: likewise of the second.
    """
    whole, before = list[np.ndarray](), list[np.ndarray]()
    for start, stop in _parts(users.num_events(max_events), model.dim):
        batch = users.batch(start, stop, max_events, is_whole, is_before)
        if not len(batch.histories.history_items):  # users of one event, and only what came before it is wanted
            history_HD = np.zeros((0, model.dim), dtype=np.float32)
        else:
            history_HD = encode(model, batch.histories).cpu().numpy()
        for parts, membership in ((whole, batch.whole), (before, batch.before)):
            sum_ND = membership @ history_HD
            parts.append(sum_ND / np.maximum(np.linalg.norm(sum_ND, axis=1, keepdims=True), 1e-12))
    return np.concatenate(whole), np.concatenate(before)


def _questions(users: ProbeUsers, config: EvaluationConfig) -> dict[str, Question]:
    questions = dict[str, Question]()
    for name, label in users.labels.items() if config.probe_labels else ():
        asked = np.flatnonzero(label.labels != UNKNOWN)
        questions[name] = Question(asked, label.labels[asked])
    if config.probe_next_item:
        if NEXT_ITEM in questions:
            raise ValueError(f"a profile label is called {NEXT_ITEM!r}, as a probe is: set probe_next_item=false")
        task = next_item(users, config.probe.seed)
        num_train = int(users.is_train[task.users].sum())
        if num_train < MIN_TRAIN or num_train == len(task.users):
            raise ValueError(
                f"of {num_train} training users and {len(task.users) - num_train} held-out ones a next item is known: "
                f"a probe needs {MIN_TRAIN} and 1; probe more users, or set probe_next_item=false"
            )
        questions[NEXT_ITEM] = Question(task.users, task.labels, task.vectors, NEXT_ITEM_CUTOFF)
    return questions


def _parts(num_events: np.ndarray, dim: int) -> Iterator[tuple[int, int]]:
    """Borders of consecutive users whose item vectors fit into `ITEM_VECTORS_BYTES`; at least one user each."""
    most = max(1, ITEM_VECTORS_BYTES // (4 * dim))
    part = np.cumsum(num_events) // most
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    yield from zip(starts.tolist(), [*starts[1:].tolist(), len(num_events)], strict=True)
