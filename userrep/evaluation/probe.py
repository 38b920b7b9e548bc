"""What frozen user vectors tell about a user: a small network reads them, and is measured on users it has not seen.

Legend: `N` users, `D` width of a user vector, `C` classes, `K` width of a class vector.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.evaluation.ranking import class_ranks, hit_rates

MIN_TRAIN = 10  # users: fewer leave nothing to stop on
LOGITS_AT_ONCE = 1 << 22  # 16 MiB of them


class ProbeConfig(Config):
    """The network that reads user vectors, and how it is trained; the same for every encoder."""

    hidden_dim: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=256, ge=1)
    max_epochs: int = Field(default=60, ge=1)
    patience: int = Field(default=4, ge=1)  # epochs without a smaller loss on the users that it stops on
    stopping_share: float = Field(default=0.15, gt=0, le=0.5)  # of the training users
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
    """Trains a network with one hidden layer on the training users, and measures it on the test users.

    Vectors are standardised by the training users. Training starts where nothing is known of a user (every class as
    often as in training; with class vectors, all alike) and ends when the loss on a part of the training users falls no
    more; the best state on the way is the one that is measured. Deterministic by the seed; torch's own is left alone.

    Args:
        train_vectors: float32 (N, D).
        train_labels: classes in [0, C), int (N,).
        test_vectors: float32 (N', D).
        test_labels: likewise (N',).
        config: the network.
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
    network = _train(train_ND, torch.from_numpy(train_labels.astype(np.int64)), classes_CK, prior_C, config)
    return _measure(network, test_ND, test_labels, classes_CK, k)


def class_frequencies(
    train_labels: np.ndarray, test_labels: np.ndarray, num_classes: int | None = None, k: int = 1
) -> ProbeResult:
    """What knowing nothing of a user scores: each class is as likely as it is frequent in training (each counted once
    more, so that none is impossible).

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


def _network(dim: int, num_outputs: int, prior_C: np.ndarray | None, config: ProbeConfig) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        hidden, output = nn.Linear(dim, config.hidden_dim), nn.Linear(config.hidden_dim, num_outputs)
    nn.init.zeros_(output.weight)
    nn.init.zeros_(output.bias)
    if prior_C is not None:
        output.bias.data += torch.from_numpy(prior_C)
    return nn.Sequential(hidden, nn.GELU(), output)


def _train(
    vectors_ND: torch.Tensor,
    labels_N: torch.Tensor,
    classes_CK: torch.Tensor | None,
    prior_C: np.ndarray | None,
    config: ProbeConfig,
) -> nn.Sequential:
    """The network at its smallest loss on the users that it stops on."""
    num_outputs = len(prior_C) if classes_CK is None and prior_C is not None else classes_CK.shape[1]
    network = _network(vectors_ND.shape[1], num_outputs, prior_C, config)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(vectors_ND), generator=generator)
    num_stopping = max(1, round(config.stopping_share * len(order)))
    stopping, fitted = order[:num_stopping], order[num_stopping:]
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best, best_loss, num_worse = copy.deepcopy(network), _loss(network, vectors_ND, labels_N, stopping, classes_CK), 0
    for _ in range(config.max_epochs):
        for users in fitted[torch.randperm(len(fitted), generator=generator)].split(config.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(_logits(network, vectors_ND[users], classes_CK), labels_N[users]).backward()
            optimizer.step()
        loss = _loss(network, vectors_ND, labels_N, stopping, classes_CK)
        num_worse = num_worse + 1 if loss >= best_loss else 0
        if loss < best_loss:
            best, best_loss = copy.deepcopy(network), loss
        if num_worse == config.patience:
            break
    return best


def _logits(network: nn.Module, vectors_ND: torch.Tensor, classes_CK: torch.Tensor | None) -> torch.Tensor:
    output = network(vectors_ND)
    return output if classes_CK is None else output @ classes_CK.T


@torch.no_grad()
def _loss(
    network: nn.Module,
    vectors_ND: torch.Tensor,
    labels_N: torch.Tensor,
    users: torch.Tensor,
    classes_CK: torch.Tensor | None,
) -> float:
    return float(F.cross_entropy(_logits(network, vectors_ND[users], classes_CK), labels_N[users]))


@torch.no_grad()
def _measure(
    network: nn.Module, vectors_ND: torch.Tensor, labels_N: np.ndarray, classes_CK: torch.Tensor | None, k: int
) -> ProbeResult:
    losses, hits = list[np.ndarray](), list[np.ndarray]()
    num_classes = len(classes_CK) if classes_CK is not None else network(vectors_ND[:1]).shape[1]
    size = max(1, LOGITS_AT_ONCE // num_classes)
    for start in range(0, len(labels_N), size):
        logits, labels = _logits(network, vectors_ND[start : start + size], classes_CK), labels_N[start : start + size]
        target = torch.from_numpy(labels.astype(np.int64))
        losses.append(F.cross_entropy(logits.double(), target, reduction="none").numpy())
        hits.append(hit_rates(*class_ranks(logits.numpy(), labels), k))
    return ProbeResult(float(np.concatenate(losses).mean()), float(np.concatenate(hits).mean()))
