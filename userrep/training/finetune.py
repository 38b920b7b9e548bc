"""Fine-tunes a Recformer for the next item of one catalogue, in two stages. No Ray in here.

While items move, the item matrix is encoded anew before every epoch; then the best model is loaded with its matrix, and
only the model goes on. In both, the loss is a softmax over all items of the catalogue, whose vectors are constant.

Source: Li et al., KDD 2023 (arXiv 2305.13731, section 2.4 and algorithm 1). Differs: the pretrained model is a
candidate for the best one, so validation never ends below zero-shot; each stage has an optimizer and a schedule of its
own (in AaronHeee/RecFormer the rate of the first one runs on, down to zero); no history is empty; a short epoch is
several passes (`min_steps`).

Legend: `B` samples, `I` items of the catalogue, `D` width.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from userrep.config import Config, ConfigError
from userrep.data.leave_one_out import LeaveOneOut
from userrep.data.next_item_samples import NextItemSamples, SequenceReader, draw_samples, trainable_users
from userrep.losses.masked_lm import linear_cross_entropy
from userrep.models.recformer import Recformer, RecformerConfig
from userrep.training.encoding import MemoryConfig
from userrep.training.finetune_evaluation import encode_items, evaluate
from userrep.training.objective import Precision
from userrep.training.optim import OptimConfig, build_optimizer
from userrep.training.recformer_encoding import RecformerPlanner, encode_with_graph
from userrep.training.state import NonFiniteLossError

SELECTED_BY = "ndcg_at_10"
Stage = Literal["pretrained", "moving", "frozen"]
STAGES: tuple[Stage, ...] = ("pretrained", "moving", "frozen")  # their places are seeds


class StageConfig(Config):
    """How long a stage may last."""

    max_epochs: int = Field(ge=1)  # for which the learning rate is planned
    patience: int = Field(ge=1)  # evaluations without a better validation NDCG@10 after which the stage ends


class FinetuneConfig(Config):
    """How a pretrained model is fine-tuned. Without any stage it stays as it is: zero-shot."""

    moving: StageConfig | None = StageConfig(max_epochs=30, patience=5)  # the item matrix is encoded every epoch
    frozen: StageConfig | None = StageConfig(max_epochs=20, patience=3)  # the item matrix stays; None: one stage
    evaluate_every: int = Field(default=1, ge=1)  # epochs
    # Of an epoch: where one pass over the users is shorter, as of a small share, it is as many passes as that takes.
    min_steps: int = Field(default=10, ge=1)
    batch_size: int = Field(default=64, ge=1)  # users
    # The paper's; at ten times as much, a small model lost what it knew while its items moved.
    learning_rate: float = Field(default=5e-5, gt=0)
    embedding_learning_rate: float | None = Field(default=None, gt=0)  # of embeddings; None: the same
    warmup_steps: int = Field(default=100, ge=0)  # of each stage, at most half of it; then the rate falls linearly
    weight_decay: float = Field(default=0.0, ge=0)  # of matrices alone
    max_grad_norm: float = Field(default=1.0, gt=0)
    freeze_token_embeddings: bool = False
    share: float = Field(default=1.0, gt=0, le=1)  # of the training users; smaller shares are parts of larger ones
    share_seed: int = Field(default=0, ge=0)  # which users
    max_items: int | None = Field(default=None, ge=1)  # of a history; None: as the model was pretrained
    max_tokens: int | None = Field(default=None, ge=1)  # of a sequence; likewise
    precision: Precision = "float32"  # of the encoder's matrix products in training
    seed: int = Field(default=0, ge=0)

    @property
    def is_zero_shot(self) -> bool:
        """Whether nothing is trained."""
        return self.moving is None and self.frozen is None


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch that was evaluated.

    Attributes:
        stage: which one; `pretrained` is what there was before any.
        number: of the epoch in the stage, from 1; 0 of `pretrained`.
        loss: mean over the epoch's samples, nats; None of `pretrained`.
        ndcg_at_10: mean over validation.
        is_best: whether none before was better.
        seconds: since the evaluation before.
    """

    stage: Stage
    number: int
    loss: float | None
    ndcg_at_10: float
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class Finetuned:
    """A model's item matrix (I, D), and all epochs that were evaluated; the best one's model goes with the matrix."""

    item_matrix: torch.Tensor
    epochs: tuple[Epoch, ...]
    num_train_users: int


Report = Callable[[Epoch], None]


def open_reader(data: LeaveOneOut, model: RecformerConfig, cls_id: int, config: FinetuneConfig) -> SequenceReader:
    """How the model reads the data.

    Raises:
        ConfigError: longer histories or sequences than the model has positions for.
    """
    limits = []
    for name in ("max_items", "max_tokens"):
        most, wanted = getattr(model, name), getattr(config, name)
        if wanted is not None and wanted > most:
            raise ConfigError(f"finetune.{name}={wanted}, and the model was made for at most {most}: lower it")
        limits.append(wanted or most)
    return SequenceReader(data, cls_id, *limits)


def finetune(
    model: Recformer,
    reader: SequenceReader,
    config: FinetuneConfig,
    report: Report = lambda epoch: None,
    memory: MemoryConfig | None = None,
) -> Finetuned:
    """Fine-tunes a model in place; in the end it is the best one.

    Args:
        model: pretrained.
        reader: of the data, from `open_reader`.
        config: how.
        report: is told of every evaluation.
        memory: what a step may take; of no influence on the result.

    Raises:
        ValueError: nobody can be trained on.
        NonFiniteLossError: training has diverged.
    """
    run = _Run(model, reader, config, report, memory or MemoryConfig())
    run.evaluate("pretrained", 0, None)
    if config.moving is not None:
        run.train("moving", config.moving)
    if config.frozen is not None:
        run.train("frozen", config.frozen)
    return Finetuned(run.item_ID, tuple(run.epochs), len(run.users))


def next_item_loss(
    user_BD: torch.Tensor, item_ID: torch.Tensor, logit_scale: torch.Tensor, targets_B: torch.Tensor
) -> torch.Tensor:
    """Mean of -log softmax(exp(logit_scale) * cosine) of the right item among all items, a few rows at a time.

    Args:
        user_BD: vectors of histories, L2 norm 1.
        item_ID: the item matrix, L2 norm 1, without gradient.
        logit_scale: log of the inverse temperature.
        targets_B: the right items, int64.
    """
    scaled_BD = user_BD * logit_scale.exp().to(user_BD.dtype)
    weight_B = user_BD.new_full((len(targets_B),), 1 / len(targets_B))
    return linear_cross_entropy(scaled_BD, item_ID, item_ID.new_zeros(len(item_ID)), targets_B, weight_B)[0]


def rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Fraction of the peak learning rate at a step of a stage, counted from 0: linear up, then down; in (0, 1]."""
    warmup = min(warmup_steps, num_steps // 2)
    return (step + 1) / (warmup + 1) if step < warmup else (num_steps - step) / (num_steps - warmup)


class _Run:
    """A model on its way, and the best one so far."""

    def __init__(
        self, model: Recformer, reader: SequenceReader, config: FinetuneConfig, report: Report, memory: MemoryConfig
    ) -> None:
        self.model, self.reader, self.config = model, reader, config
        is_trained = not config.is_zero_shot
        self.users = trainable_users(reader.data, config.share, config.share_seed) if is_trained else np.arange(0)
        self.epochs: list[Epoch] = []
        self.item_ID = encode_items(model, reader)
        self._report, self._planner = report, RecformerPlanner(model, memory)
        self._best: tuple[float, dict[str, torch.Tensor], torch.Tensor] | None = None
        self._since = time.perf_counter()
        self._steps_per_pass = max(1, -(-len(self.users) // config.batch_size))
        self._num_passes = -(-config.min_steps // self._steps_per_pass)
        model.token_embedding.weight.requires_grad_(not config.freeze_token_embeddings)

    def evaluate(self, stage: Stage, number: int, loss: float | None) -> bool:
        """Asks validation; keeps the model and its matrix if they are the best so far, and says whether they are."""
        ndcg = float(evaluate(self.model, self.item_ID, self.reader, "validation")[SELECTED_BY].mean())
        is_best = self._best is None or ndcg > self._best[0]
        if is_best:
            # The matrix is never changed in place, so it needs no copy.
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            self._best = (ndcg, state, self.item_ID)
        now = time.perf_counter()
        self.epochs.append(Epoch(stage, number, loss, ndcg, is_best, now - self._since))
        self._since = now
        self._report(self.epochs[-1])
        return is_best

    def train(self, name: Stage, stage: StageConfig) -> None:
        """Runs a stage, and loads the best model with its matrix."""
        config = self.config
        rate = config.embedding_learning_rate or config.learning_rate
        optim = OptimConfig(
            learning_rate=config.learning_rate,
            embedding_learning_rate=rate,
            weight_decay=config.weight_decay,
            beta2=0.999,  # AdamW's own, which the official code takes
        )
        optimizer, num_worse = build_optimizer(self.model, optim), 0
        for number in range(1, stage.max_epochs + 1):
            if name == "moving" and number > 1:  # before the first epoch, it is that of the model already
                self.item_ID = encode_items(self.model, self.reader)
            loss = self._train_epoch(name, stage, number, optimizer)
            if number % config.evaluate_every and number < stage.max_epochs:
                continue
            num_worse = 0 if self.evaluate(name, number, loss) else num_worse + 1
            if num_worse == stage.patience:
                break
        assert self._best is not None, "the pretrained model was evaluated first"
        self.model.load_state_dict(self._best[1])
        self.item_ID = self._best[2]

    def _train_epoch(self, name: Stage, stage: StageConfig, number: int, optimizer: torch.optim.Optimizer) -> float:
        """Mean loss over the samples."""
        config, total, num_samples = self.config, 0.0, 0
        steps_per_epoch = self._num_passes * self._steps_per_pass
        step = (number - 1) * steps_per_epoch
        for one in range((number - 1) * self._num_passes, number * self._num_passes):
            samples = draw_samples(self.reader.data, self.users, config.seed, STAGES.index(name), one)
            for batch in samples.batches(config.batch_size):
                factor = rate_factor(step, stage.max_epochs * steps_per_epoch, config.warmup_steps)
                for group in optimizer.param_groups:
                    group["lr"] = factor * group["peak_lr"]
                total += len(batch) * self._step(batch, optimizer, f"{name}, epoch {number}, step {step}")
                step, num_samples = step + 1, num_samples + len(batch)
        return total / num_samples

    def _step(self, batch: NextItemSamples, optimizer: torch.optim.Optimizer, where: str) -> float:
        sequences, device = self.reader.histories(batch.histories), self.item_ID.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            user_BD = encode_with_graph(self.model, sequences, self._planner.plan(sequences))
        targets_B = torch.from_numpy(batch.targets.astype("int64")).to(device)
        loss = next_item_loss(user_BD, self.item_ID, self.model.logit_scale, targets_B)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm).item()
        if not math.isfinite(loss.item() + norm):
            message = f"{where}: loss {loss.item()}, gradient norm {norm}: lower finetune.learning_rate"
            raise NonFiniteLossError(message, {"loss": str(loss.item()), "grad_norm": str(norm)})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
