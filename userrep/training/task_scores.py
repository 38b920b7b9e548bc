"""What a method is measured by: its scores on held-out samples of a task, and how alike the masks of its tasks are.

A task of kind `vector` is measured by retrieval: recall at 10 among users, of the later half of a sequence given the
earlier one, and the reverse.

Legend: `N` samples, `R` rows of item sequences, `U` users of a pool, `L` positions, `C` classes, `M` tasks, `K` mask
points, `D` width.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from userrep.continual.method import Method
from userrep.data.tasks import PAD, ItemSequences, Task
from userrep.evaluation.ranking import METRIC_CUTOFFS, class_ranks, mrr_at_k, retrieval_hits
from userrep.losses.gather import all_gather_uneven, rank, world_size
from userrep.training.state import NonFiniteLossError

MAX_POOL = 1000  # users among whom a half of a sequence is to be found


class Scored(NamedTuple):
    """What the task's kind asks for, in [0, 1], and the mean cross-entropy in nats; NaN of a task without a loss."""

    score: float
    loss: float


@torch.no_grad()
def score_task(
    method: Method, number: int, task: Task, sequences: ItemSequences, split: str, batch_size: int
) -> Scored:
    """Measures a task on all samples of a split.

    A collective: every rank answers for its part of the rows. A row is encoded once, however many samples ask about it.

    Args:
        method: that was taught the task.
        number: of the task in the method.
        task: whose samples are ranked among all of its classes.
        sequences: of all users.
        split: `validation` or `test`.
        batch_size: rows, and samples, whose logits exist at a time.

    Raises:
        NonFiniteLossError: on every rank, where a logit is not finite on any.
    """
    samples = task.samples(split)
    if task.kind == "vector":
        scores_UU = _similarities(method, number, sequences.items[task.rows[samples[:MAX_POOL]]], batch_size)
        if not np.isfinite(scores_UU).all():
            raise _non_finite(task, split)
        return Scored(float(retrieval_hits(scores_UU)[10].mean()), math.nan)
    samples = samples[np.argsort(task.rows[samples], kind="stable")]
    rows, firsts = np.unique(task.rows[samples], return_index=True)
    borders = np.append(firsts, len(samples))  # samples of row r are [borders[r], borders[r + 1])
    mine = [len(rows) * part // world_size() for part in (rank(), rank() + 1)]
    device = next(method.parameters()).device
    # Numbers of better and of equal classes, and cross-entropies; a rank may have no rows.
    parts = [torch.empty(0, 3, dtype=torch.float64, device=device)]
    was_training = method.training
    method.eval()
    for start in range(mine[0], mine[1], batch_size):
        stop = min(start + batch_size, mine[1])
        items_RL = torch.from_numpy(sequences.items[rows[start:stop]]).long().to(device)
        logits_RC = method.logits(items_RL, number)
        if not logits_RC.isfinite().all():  # other ranks wait for this one, and are to end with it
            parts.append(parts[0].new_full((1, 3), torch.nan))
            break
        norm_R, logits_RC = logits_RC.logsumexp(dim=1).double().cpu().numpy(), logits_RC.cpu().numpy()
        row_N = np.repeat(np.arange(stop - start), np.diff(borders[start : stop + 1]))
        labels_N = task.labels[samples[borders[start] : borders[stop]]]
        for first in range(0, len(row_N), batch_size):
            chunk = slice(first, first + batch_size)
            own_N = logits_RC[row_N[chunk], labels_N[chunk]]
            ranks = class_ranks(logits_RC[row_N[chunk]], labels_N[chunk])
            parts.append(torch.from_numpy(np.stack([*ranks, norm_R[row_N[chunk]] - own_N], axis=1)).to(device))
    method.train(was_training)
    gathered_N3 = all_gather_uneven(torch.cat(parts))
    if not gathered_N3.isfinite().all():
        raise _non_finite(task, split)
    num_higher_N, num_same_N, loss_N = gathered_N3.cpu().numpy().T
    counts = num_higher_N.astype(np.int64), num_same_N.astype(np.int64)
    return Scored(mrr_at_k(*counts, METRIC_CUTOFFS[task.metric]), float(loss_N.mean()))


def _non_finite(task: Task, split: str) -> NonFiniteLossError:
    message = f"logits of task {task.name} are not finite for {split} users: lower its learning rate"
    return NonFiniteLossError(message, {"task": task.name, "split": split})


def _similarities(method: Method, number: int, items_UL: np.ndarray, batch_size: int) -> np.ndarray:
    """Cosines of earlier halves (rows) and later ones, (U, U). Every rank computes all of it: the users are few."""
    was_training = method.training
    method.eval()
    device = next(method.parameters()).device
    earlier_UD, later_UD = (
        F.normalize(
            torch.cat(
                [
                    method.vectors(torch.from_numpy(half_UL[start : start + batch_size]).long().to(device), number)
                    for start in range(0, len(half_UL), batch_size)
                ]
            ),
            dim=-1,
        )
        for half_UL in halves(items_UL)
    )
    method.train(was_training)
    return (earlier_UD @ later_UD.T).double().cpu().numpy()


def halves(items_UL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Earlier and later half of left-padded sequences, each left-padded, (U, L); of an odd number the later has more.

    Args:
        items_UL: two items at least in every row.
    """
    num_places = items_UL.shape[1]
    num_items_U = (items_UL != PAD).sum(axis=1)
    place_L = np.arange(num_places)
    border_U = num_places - (num_items_U + 1) // 2  # where the later half begins
    later_UL = np.where(place_L >= border_U[:, None], items_UL, PAD)
    source_UL = place_L - (num_places - border_U)[:, None]
    earlier_UL = np.where(source_UL >= 0, np.take_along_axis(items_UL, source_UL.clip(0), axis=1), PAD)
    return earlier_UL, later_UL


@torch.no_grad()
def mask_similarity(method: Method) -> np.ndarray | None:
    """Cosine of the final masks of every two tasks, mean over mask points, (M, M); None of a method without soft masks.

    Masks are positive, so it is in (0, 1]; this is what TERACON's sampling rates go by.
    """
    masks = [mask for number in range(method.current + 1) if (mask := method.final_masks(number)) is not None]
    if not masks:
        return None
    unit_MKD = F.normalize(torch.stack(masks), dim=-1)
    return torch.einsum("ikd,jkd->ijk", unit_MKD, unit_MKD).mean(dim=-1).cpu().double().numpy()
