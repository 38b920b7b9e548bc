"""Loss and retrieval of a model on a pool of held-out users, computed by all workers together."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.special import logsumexp

from userrep.data.batch import UserBatch
from userrep.data.pool import Pool
from userrep.evaluation.pool_loss import infonce
from userrep.evaluation.ranking import expected_hits, retrieval_hits
from userrep.losses.contrastive import MAX_LOGIT_SCALE
from userrep.losses.gather import all_gather_uneven, rank, world_size
from userrep.training.encoding import Encoder, encode

ENCODE_USERS = 256  # bounds the memory of a forward pass

EncodeViews = Callable[[UserBatch], torch.Tensor]  # vectors of both views of every user, (2B, D), L2 norm 1


@torch.no_grad()
def gather_pool(encode: EncodeViews, pool: Pool, dim: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Anchor and positive vectors, each float32 (P, D). A collective: every rank encodes its part of the pool."""
    borders = np.linspace(0, len(pool), world_size() + 1).astype(int)
    empty = torch.empty(0, dim, device=device)  # a rank may have no users
    anchors, positives = [empty], [empty]
    for start in range(borders[rank()], borders[rank() + 1], ENCODE_USERS):
        stop = min(start + ENCODE_USERS, borders[rank() + 1])
        anchor, positive = encode(pool.batch(start, stop)).chunk(2)
        anchors.append(anchor)
        positives.append(positive)
    anchor_PD, positive_PD = (all_gather_uneven(torch.cat(views)).cpu().numpy() for views in (anchors, positives))
    return anchor_PD, positive_PD


def encode_pool(model: Encoder, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of both views, as `gather_pool`."""
    return gather_pool(lambda batch: encode(model, batch), pool, model.dim, model.logit_scale.device)


def validate(model: Encoder, pool: Pool) -> dict[str, float]:
    """`val/loss` (symmetric InfoNCE with the whole pool as the batch; chance is log P) and `val/recall_at_{1,10}`."""
    was_training = model.training
    model.eval()
    anchor_PD, positive_PD = encode_pool(model, pool)
    model.train(was_training)
    scores_PP = anchor_PD @ positive_PD.T
    scale = min(model.logit_scale.exp().item(), MAX_LOGIT_SCALE)
    hits = retrieval_hits(scores_PP)
    return {
        "val/loss": infonce(anchor_PD, positive_PD, scale),
        "val/recall_at_1": float(hits[1].mean()),
        "val/recall_at_10": float(hits[10].mean()),
        "val/logit_scale": scale,
    }


def next_item_metrics(anchor_PD: np.ndarray, item_PD: np.ndarray, scale: float) -> dict[str, float]:
    """`val/loss` and `val/recall_at_{1,10}` of finding each user's next item among those of the whole pool.

    Users with one next item are no rivals: the item stands in the pool as often as it is asked for, with equal scores.
    """
    scores_PP = anchor_PD @ item_PD.T
    return {
        "val/loss": float(np.mean(np.asarray(logsumexp(scale * scores_PP, axis=1)) - scale * np.diagonal(scores_PP))),
        **{f"val/recall_at_{k}": float(expected_hits(scores_PP, k).mean()) for k in (1, 10)},
    }
