"""Floating-point operations of a CLUE training step and parameters of the encoder, from its shape and real lengths.

Counted: matrix products and attention, two operations per multiply-add, over unique items without padding: forward,
backward, and the second forward pass of chunks whose graph was not kept (`losses/grad_cache.py`), and the logits of the
loss with their gradients. Not counted, as in `torch.utils.flop_counter`: embedding lookups, norms, GELU, softmax, means
and the optimizer, none of which multiplies matrices.

Source: two operations per multiply-add, backward twice the forward: Kaplan et al. 2020 (arXiv 2001.08361, section 2.1).
Differs: attention is counted by its real lengths, and its backward is 2.5 times the forward, since the kernel computes
the scores once more (Dao et al. 2022, arXiv 2205.14135, section 3.1); nothing is taken as 6 N tokens.

Legend: `N` sequences, `D` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from userrep.models.clue import ClueConfig

MULTIPLY_ADD = 2  # operations
MATRIX_BACKWARD = 2.0  # over the forward: gradients of the input and of the matrix
ATTENTION_BACKWARD = 2.5  # over the forward of two products: scores again, then gradients of weights, q, k and v


@dataclass(frozen=True)
class Sequences:
    """Ragged sequences, as far as what they cost goes. All are sums, so means over batches are sequences too.

    Attributes:
        count: sequences.
        positions: tokens or events of all of them.
        pairs: squared lengths, without sequences of one position, which `models/layers.py` does not let attend.
    """

    count: float = 0.0
    positions: float = 0.0
    pairs: float = 0.0

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Sequences":
        """Args: lengths (N,), each >= 1."""
        lengths = lengths.astype(np.float64)
        return cls(len(lengths), float(lengths.sum()), float((lengths**2 * (lengths > 1)).sum()))

    @classmethod
    def equal(cls, count: int, length: int) -> "Sequences":
        """So many sequences of one length."""
        return cls(count, count * length, count * length**2 if length > 1 else 0)


@dataclass(frozen=True)
class StepShape:
    """What a training step computes on; of several workers, add up.

    Attributes:
        items: unique items of the batch, over their tokens.
        histories: over their events.
        items_again: items of chunks that are encoded a second time.
        histories_again: histories of such chunks.
        logits: pairs of an anchor and a positive that are compared, own positives included.
        logits_again: of them, those that the backward pass compares once more.
        padded_items: every event's item, none recognised as equal to another, histories and items as long as the
            longest of the batch: what an implementation with one tensor of users x events x tokens encodes.
        padded_histories: the histories of that tensor.
    """

    items: Sequences
    histories: Sequences
    items_again: Sequences
    histories_again: Sequences
    logits: float
    logits_again: float
    padded_items: Sequences
    padded_histories: Sequences

    @classmethod
    def of(
        cls,
        item_lengths: np.ndarray,
        history_lengths: np.ndarray,
        logits: float,
        logits_again: float,
        items_again: np.ndarray | None = None,
        histories_again: np.ndarray | None = None,
    ) -> "StepShape":
        """From lengths.

        Args:
            item_lengths: tokens of every unique item, (U,), each >= 1.
            history_lengths: events of every history, (H,), each >= 1; two histories a user.
            logits: as the attribute.
            logits_again: as the attribute.
            items_again: tokens of the items that are encoded twice; default: none is.
            histories_again: events of the histories that are encoded twice; default: none is.
        """
        none, longest = np.zeros(0), int(history_lengths.max())
        return cls(
            items=Sequences.of(item_lengths),
            histories=Sequences.of(history_lengths),
            items_again=Sequences.of(none if items_again is None else items_again),
            histories_again=Sequences.of(none if histories_again is None else histories_again),
            logits=logits,
            logits_again=logits_again,
            padded_items=Sequences.equal(len(history_lengths) * longest, int(item_lengths.max())),
            padded_histories=Sequences.equal(len(history_lengths), longest),
        )

    @classmethod
    def mean(cls, shapes: Sequence["StepShape"]) -> "StepShape":
        """The mean step of several; its cost is the mean of their costs, since cost is linear in every number."""
        means = {}
        for field in fields(cls):
            values = [getattr(shape, field.name) for shape in shapes]
            if isinstance(values[0], Sequences):
                means[field.name] = Sequences(
                    *np.mean([[v.count, v.positions, v.pairs] for v in values], axis=0).tolist()
                )
            else:
                means[field.name] = sum(values) / len(values)
        return cls(**means)


@dataclass(frozen=True)
class Flops:
    """Operations of a part of a step: first forward pass, backward pass, and what is computed a second time."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.again


@dataclass(frozen=True)
class StepCost:
    """Operations of a training step.

    Attributes:
        items: Item Transformer.
        histories: Service Transformer.
        head: the head behind it.
        loss: logits and their gradients; computed a second time are the tiles of the backward pass.
        padded_flops: forward and backward of the padded tensor that `StepShape` describes, without a second forward.
    """

    items: Flops
    histories: Flops
    head: Flops
    loss: Flops
    padded_flops: float

    @property
    def total_flops(self) -> float:
        """What the step computes: compute C of a scaling law."""
        return sum(part.total for part in self._parts().values())

    @property
    def model_flops(self) -> float:
        """Without what is computed a second time: the numerator of MFU (PaLM, arXiv 2204.02311, appendix B)."""
        return self.total_flops - sum(part.again for part in self._parts().values())

    def describe(self) -> str:
        """A line for each part, and the padded figure."""
        lines = [f"{'GFLOP of a step':<20}{'forward':>12}{'backward':>12}{'again':>12}{'total':>12}"]
        for name, part in self._parts().items():
            columns = (part.forward, part.backward, part.again, part.total)
            lines.append(f"{name:<20}" + "".join(f"{value / 1e9:>12,.4g}" for value in columns))
        lines.append(f"{'sum':<20}{self.total_flops / 1e9:>48,.4g}")
        lines.append(
            f"{'padded':<20}{self.padded_flops / 1e9:>48,.4g}  ({self.padded_flops / self.total_flops:,.1f} times)"
        )
        return "\n".join(lines)

    def _parts(self) -> dict[str, Flops]:
        return {"items": self.items, "histories": self.histories, "head": self.head, "loss": self.loss}


def step_cost(config: ClueConfig, shape: StepShape, use_blocks: bool = True) -> StepCost:
    """Operations of one training step: forward, backward, and what is computed twice.

    Args:
        config: shape of the encoder.
        shape: what the step computes on.
        use_blocks: False for steps that leave the transformer blocks out.
    """
    layers = (config.item_layers, config.service_layers) if use_blocks else (0, 0)
    items = _transformer(config, layers[0], shape.items, shape.items_again)
    if layers[0] and shape.items_again.positions:
        # Making a graph again ends with the last tensor that it holds: the input of the last block's last matrix.
        skipped = MULTIPLY_ADD * config.mlp_ratio * config.dim**2 * shape.items_again.positions
        items = Flops(items.forward, items.backward, items.again - skipped)
    per_logit = MULTIPLY_ADD * config.dim
    head = _head(config, shape.histories.count, shape.histories_again.count)
    loss = Flops(
        forward=per_logit * shape.logits,
        backward=MATRIX_BACKWARD * per_logit * shape.logits,
        again=per_logit * shape.logits_again,
    )
    padded = (
        _transformer(config, layers[0], shape.padded_items),
        _transformer(config, layers[1], shape.padded_histories),
        _head(config, shape.padded_histories.count),
        Flops(loss.forward, loss.backward),
    )
    return StepCost(
        items=items,
        histories=_transformer(config, layers[1], shape.histories, shape.histories_again),
        head=head,
        loss=loss,
        padded_flops=sum(part.total for part in padded),
    )


def parameter_counts(config: ClueConfig, vocab_size: int) -> dict[str, int]:
    """What `models/clue.py`'s `count_parameters` would count, without making a model: the same keys."""
    dim, hidden = config.dim, config.mlp_ratio * config.dim
    norms, attention, mlp = 4 * dim, 4 * dim**2 + 4 * dim, 2 * dim * hidden + hidden + dim
    head = 2 * dim + 2 * config.head_ratio * dim**2 + config.head_ratio * dim + dim
    scalars = 2  # scale and bias of the logits
    non_embedding = (config.item_layers + config.service_layers) * (norms + attention + mlp) + head + scalars
    embedding = (vocab_size + config.max_tokens) * dim
    return {"embedding": embedding, "non_embedding": non_embedding, "total": embedding + non_embedding}


def _transformer(config: ClueConfig, num_layers: int, once: Sequences, again: Sequences | None = None) -> Flops:
    per_position = num_layers * MULTIPLY_ADD * config.dim**2 * (4 + 2 * config.mlp_ratio)  # q k v, output, MLP
    per_pair = num_layers * MULTIPLY_ADD * 2 * config.dim  # scores, and the mean of the values by them
    matrices, attention = per_position * once.positions, per_pair * once.pairs
    again = again or Sequences()
    return Flops(
        forward=matrices + attention,
        backward=MATRIX_BACKWARD * matrices + ATTENTION_BACKWARD * attention,
        again=per_position * again.positions + per_pair * again.pairs,
    )


def _head(config: ClueConfig, num_histories: float, num_again: float = 0.0) -> Flops:
    per_history = MULTIPLY_ADD * 2 * config.head_ratio * config.dim**2
    forward = per_history * num_histories
    return Flops(forward, MATRIX_BACKWARD * forward, per_history * num_again)
