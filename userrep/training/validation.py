"""Loss and retrieval of a model on a pool of held-out users, computed by all workers together."""

import numpy as np
import torch

from userrep.data.pool import Pool
from userrep.evaluation.pool_loss import infonce
from userrep.evaluation.ranking import retrieval_hits
from userrep.losses.contrastive import MAX_LOGIT_SCALE
from userrep.losses.gather import all_gather_uneven, rank, world_size
from userrep.training.encoding import Encoder, encode

ENCODE_USERS = 256  # bounds the memory of a forward pass


@torch.no_grad()
def encode_pool(model: Encoder, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """Anchor and positive vectors, each float32 (P, D). A collective: every rank encodes its part of the pool."""
    borders = np.linspace(0, len(pool), world_size() + 1).astype(int)
    empty = torch.empty(0, model.dim, device=model.logit_scale.device)  # a rank may have no users
    anchors, positives = [empty], [empty]
    for start in range(borders[rank()], borders[rank() + 1], ENCODE_USERS):
        stop = min(start + ENCODE_USERS, borders[rank() + 1])
        anchor, positive = encode(model, pool.batch(start, stop)).chunk(2)
        anchors.append(anchor)
        positives.append(positive)
    anchor_PD, positive_PD = (all_gather_uneven(torch.cat(views)).cpu().numpy() for views in (anchors, positives))
    return anchor_PD, positive_PD


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
