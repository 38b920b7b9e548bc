"""What frozen user vectors tell about a user: a small network reads them, and is measured on users it has not seen.

Legend: `N` users, `D` width of a user vector, `C` classes, `K` width of a class vector.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.evaluation.ranking import class_ranks, hit_rates

MIN_TRAIN = 10  # users: fewer leave nothing to stop on
LOGITS_AT_ONCE = 1 << 20  # 8 MiB of them for each network


class ProbeConfig(Config):
    """The networks that read user vectors, and how they are trained; the same for every encoder.

    Each network stops on another part of the training users, and their probabilities are averaged, and with them the
    luck of their training.
    """

    num_networks: int = Field(default=4, ge=2, le=MIN_TRAIN)
    hidden_dim: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=256, ge=1)
    max_epochs: int = Field(default=100, ge=1)
    patience: int = Field(default=4, ge=1)  # epochs without a smaller loss on the users that a network stops on
    seed: int = 0


@dataclass(frozen=True)
class ProbeResult:
    """Measured on the test users.

    Attributes:
        loss: mean cross-entropy in nats.
        score: share of users whose right class is among the k best; ties as in `ranking.py`.
    """

    loss: float
    score: float


def fit_probe(
    train_vectors: np.ndarray,
    train_labels: np.ndarray,
    test_vectors: np.ndarray,
    test_labels: np.ndarray,
    config: ProbeConfig,
    class_vectors_CK: np.ndarray | None = None,
    k: int = 1,
) -> ProbeResult:
    """Trains networks with one hidden layer on the training users, and measures them on the test users.

    Vectors are standardised by the training users. Training starts where nothing is known of a user (every class as
    often as in training; with class vectors, all alike) and ends when the loss on a part of the training users falls no
    more; the best state on the way is the one that is measured. Deterministic by the seed; torch's own is left alone.

    Args:
        train_vectors: float32 (N, D).
        train_labels: classes in [0, C), int (N,).
        test_vectors: float32 (N', D).
        test_labels: likewise (N',).
        config: the networks.
        class_vectors_CK: fixed vectors of the classes, by whose inner product with the output they are scored. Default:
            the classes are those up to the largest label, and have an output each.
        k: the score is the share of users whose right class is among the k best: 1 is accuracy.

    Raises:
        ValueError: shapes or labels do not fit, vectors that are not finite, or too few users.
    """
    num_classes = _num_classes(train_labels, test_labels, class_vectors_CK)
    _check(train_vectors, train_labels, num_classes, MIN_TRAIN)
    _check(test_vectors, test_labels, num_classes, 1)
    if train_vectors.shape[1] != test_vectors.shape[1]:
        raise ValueError(
            f"training vectors are {train_vectors.shape}, test vectors {test_vectors.shape}: one encoder's"
        )
    mean_D, std_D = train_vectors.mean(axis=0), train_vectors.std(axis=0)
    scale_D = 1 / np.where(std_D > 1e-6, std_D, np.inf)  # a dimension in which all users are alike says nothing
    train_ND, test_ND = (
        torch.from_numpy(((vectors - mean_D) * scale_D).astype(np.float32)) for vectors in (train_vectors, test_vectors)
    )
    classes_CK = None if class_vectors_CK is None else torch.from_numpy(class_vectors_CK.astype(np.float32))
    prior_C = np.log(_frequencies(train_labels, num_classes)) if classes_CK is None else None
    num_outputs = num_classes if classes_CK is None else classes_CK.shape[1]
    labels_N = torch.from_numpy(train_labels.astype(np.int64))
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(config.seed))
    networks = list[nn.Module]()
    for number in range(config.num_networks):
        is_fitted = torch.arange(len(order)) % config.num_networks != number
        seed = config.seed * config.num_networks + number
        network = _network(train_ND.shape[1], num_outputs, prior_C, config.hidden_dim, seed)
        fitted, stopping = (
            _Users(train_ND[users], labels_N[users], classes_CK) for users in (order[is_fitted], order[~is_fitted])
        )
        networks.append(_train(network, fitted, stopping, config, seed))
    return _measure(networks, _Users(test_ND, torch.from_numpy(test_labels.astype(np.int64)), classes_CK), k)


def class_frequencies(
    train_labels: np.ndarray, test_labels: np.ndarray, num_classes: int | None = None, k: int = 1
) -> ProbeResult:
    """What knowing nothing of a user scores: each class is as likely as it is frequent in training.

    Every class is counted once more than it is there, so that none is impossible.

    Args:
        train_labels: classes in [0, C), int (N,).
        test_labels: likewise.
        num_classes: C; default: one more than the largest label.
        k: as in `fit_probe`.
    """
    num_classes = num_classes or _num_classes(train_labels, test_labels, None)
    share_C = _frequencies(train_labels, num_classes)
    ranks = class_ranks(np.broadcast_to(share_C, (len(test_labels), num_classes)), test_labels)
    return ProbeResult(float(-np.log(share_C[test_labels]).mean()), float(hit_rates(*ranks, k).mean()))


def _num_classes(train_labels: np.ndarray, test_labels: np.ndarray, class_vectors_CK: np.ndarray | None) -> int:
    if class_vectors_CK is not None:
        return len(class_vectors_CK)
    if not len(train_labels) or not len(test_labels):
        raise ValueError(f"{len(train_labels)} training and {len(test_labels)} test users: a probe needs both")
    return 1 + int(max(train_labels.max(), test_labels.max()))


def _check(vectors: np.ndarray, labels: np.ndarray, num_classes: int, min_users: int) -> None:
    if vectors.ndim != 2 or labels.shape != (len(vectors),):
        raise ValueError(f"vectors are {vectors.shape} and labels {labels.shape}: a row and a label for each user")
    if len(vectors) < min_users:
        raise ValueError(f"{len(vectors)} users with a label: a probe needs at least {min_users}")
    if not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(f"labels are {labels.min()} to {labels.max()}: classes are 0 to {num_classes - 1}")
    if not np.isfinite(vectors).all():
        raise ValueError("user vectors are not finite: the encoder has diverged")


def _frequencies(labels: np.ndarray, num_classes: int) -> np.ndarray:
    counts_C = np.bincount(labels, minlength=num_classes) + 1.0
    return counts_C / counts_C.sum()


@dataclass(frozen=True)
class _Users:
    """Standardised vectors (N, D), classes (N,), and the vectors of all classes, if they have any."""

    vectors: torch.Tensor
    labels: torch.Tensor
    classes: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, users: torch.Tensor | slice) -> "_Users":
        return _Users(self.vectors[users], self.labels[users], self.classes)

    def logits(self, network: nn.Module) -> torch.Tensor:
        """Scores of all classes (N, C)."""
        output = network(self.vectors)
        return output if self.classes is None else output @ self.classes.T


def _network(dim: int, num_outputs: int, prior_C: np.ndarray | None, hidden_dim: int, seed: int) -> nn.Module:
    """One that says the same of every user."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden, output = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, num_outputs)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    if prior_C is not None:
        output.bias.data += torch.from_numpy(prior_C)
    return nn.Sequential(hidden, nn.GELU(), output)


def _train(network: nn.Module, fitted: _Users, stopping: _Users, config: ProbeConfig, seed: int) -> nn.Module:
    """The network at its smallest loss on the users that it stops on."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best, best_loss, num_worse = copy.deepcopy(network), _loss(network, stopping), 0
    for _ in range(config.max_epochs):
        for users in torch.randperm(len(fitted), generator=generator).split(config.batch_size):
            part = fitted.take(users)
            optimizer.zero_grad()
            F.cross_entropy(part.logits(network), part.labels).backward()
            optimizer.step()
        loss = _loss(network, stopping)
        num_worse = num_worse + 1 if loss >= best_loss else 0
        if loss < best_loss:
            best, best_loss = copy.deepcopy(network), loss
        if num_worse == config.patience:
            break
    return best


@torch.no_grad()
def _loss(network: nn.Module, users: _Users) -> float:
    return float(F.cross_entropy(users.logits(network), users.labels))


@torch.no_grad()
def _measure(networks: list[nn.Module], users: _Users, k: int) -> ProbeResult:
    losses, hits = list[np.ndarray](), list[np.ndarray]()
    size = max(1, LOGITS_AT_ONCE // users.take(slice(1)).logits(networks[0]).shape[1])
    for start in range(0, len(users), size):
        part = users.take(slice(start, start + size))
        logs = torch.stack([part.logits(network).double().log_softmax(dim=1) for network in networks])
        log_NC = logs.logsumexp(dim=0) - math.log(len(networks))
        losses.append(F.nll_loss(log_NC, part.labels, reduction="none").numpy())
        hits.append(hit_rates(*class_ranks(log_NC.numpy(), part.labels.numpy()), k))
    return ProbeResult(float(np.concatenate(losses).mean()), float(np.concatenate(hits).mean()))
