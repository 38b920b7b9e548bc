"""Trains the bag-of-tokens baseline in this process: same samples, same order, same loss as the encoder."""

from collections.abc import Callable
from pathlib import Path

import torch

from userrep.data.stream import local_batches, make_plan
from userrep.data.tokenizer import read_idf
from userrep.manifest import read_manifest
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.training.loop import PretrainConfig
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, build_optimizer
from userrep.training.state import TrainState, train_step

# Tuned on the validation users of yelp2019 and amazon2014 (pipelines/records/LOG.md), to be an honest opponent.
BAG_OPTIM = OptimConfig(learning_rate=1e-3, embedding_learning_rate=5e-3)


def train_bag_of_tokens(
    shards: Path, config: PretrainConfig, num_steps: int, dim: int, progress: Callable[[int, int, int], None]
) -> BagOfTokens:
    """Returns the trained baseline.

    Args:
        shards: tokenized shards.
        config: of the encoder's run; views, batch size and seed are taken over.
        num_steps: optimizer steps.
        dim: width.
        progress: called with (steps done, steps in all, users done).
    """
    manifest = read_manifest(shards)
    plan = make_plan(manifest.facts["shards"], config.views, config.global_batch_size, config.seed, num_steps)
    torch.manual_seed(config.seed)
    model = BagOfTokens(manifest.facts["vocab_size"], dim, torch.from_numpy(read_idf(shards)))
    state = TrainState(model=model, optimizer=build_optimizer(model, BAG_OPTIM))
    objective = ClueObjective(model)
    for batch in local_batches(shards, manifest.facts["shards"], config.views, config.augment, plan):
        train_step(objective, state, batch, BAG_OPTIM, num_steps)
        progress(state.step, num_steps, state.samples_seen)
    return model.eval()

