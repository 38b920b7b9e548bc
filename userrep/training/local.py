"""Trains small comparison models in this process: same samples, same order, same loss as the encoder's run."""

from collections.abc import Callable
from pathlib import Path

import torch

from userrep.data.tokenizer import read_idf
from userrep.manifest import read_manifest
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.models.clue import Clue
from userrep.training.encoding import Encoder
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, build_optimizer
from userrep.training.settings import CluePretraining, open_training_stream
from userrep.training.state import TrainState, train_step

Progress = Callable[[int, int, int], None]  # steps done, steps in all, users done

# Tuned on the validation users of yelp2019 and amazon2014 (pipelines/records/LOG.md), to be an honest opponent.
BAG_OPTIM = OptimConfig(learning_rate=1e-3, embedding_learning_rate=5e-3)


def train_bag_of_tokens(
    shards: Path, config: CluePretraining, num_steps: int, dim: int, progress: Progress
) -> BagOfTokens:
    """The bag-of-tokens baseline after `num_steps` steps on the batches of the encoder's run."""
    torch.manual_seed(config.seed)
    model = BagOfTokens(read_manifest(shards).facts["vocab_size"], dim)
    _train(model, shards, config, BAG_OPTIM, num_steps, progress)
    return model.eval()


def train_without_blocks(shards: Path, config: CluePretraining, progress: Progress) -> Clue:
    """The encoder of the run with its transformer blocks taken out, and everything else, its length too, unchanged."""
    torch.manual_seed(config.seed)
    shape = config.model.model_copy(update={"item_layers": 0, "service_layers": 0})
    model = Clue(shape, read_manifest(shards).facts["vocab_size"], torch.from_numpy(read_idf(shards)))
    optim = config.optim.model_copy(update={"bag_steps": 0})
    _train(model, shards, config, optim, config.num_steps, progress)
    return model.eval()


def _train(
    model: Encoder,
    shards: Path,
    config: CluePretraining,
    optim: OptimConfig,
    num_steps: int,
    progress: Progress,
) -> None:
    state = TrainState(model=model, optimizer=build_optimizer(model, optim))
    objective = ClueObjective(model, loss=config.loss)
    for batch in open_training_stream(shards, config, num_steps).batches():
        train_step(objective, state, batch, optim, num_steps)
        progress(state.step, num_steps, state.samples_seen)
