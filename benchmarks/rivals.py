"""What a reader would build or install instead: padded and length-sorted encoders, and other ways to the same loss.

The encoders have the shape of `Clue` and can take its weights, so that a test shows that they compute the same vectors.

Legend: `H` histories, `E` events, `S` event slots of a padded history, `U` items of the dictionary, `N` sequences,
`L` longest of them, `D` width, `B` users.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from userrep.data.batch import HistoryBatch, gather_ranges
from userrep.models.clue import Clue

MAX_LOGIT_SCALE = 100.0
# Parameters of a block of `userrep/models/layers.py` -> those of nn.TransformerEncoderLayer.
LAYER_NAMES = {
    "attention_norm": "norm1",
    "query_key_value.weight": "self_attn.in_proj_weight",
    "query_key_value.bias": "self_attn.in_proj_bias",
    "attention_out": "self_attn.out_proj",
    "mlp_norm": "norm2",
    "mlp_in": "linear1",
    "mlp_out": "linear2",
}


class PlainClue(nn.Module):
    """The encoder of `userrep/models/clue.py` on `nn.TransformerEncoder`, with the weights of a `Clue`."""

    def __init__(self, clue: Clue) -> None:
        super().__init__()
        config, vocab_size = clue.config, len(clue.token_embedding.weight)
        self.max_tokens = config.max_tokens
        self.token_embedding = nn.Embedding(vocab_size, config.dim)
        self.token_position = nn.Embedding(config.max_tokens, config.dim)
        mlp_dim = config.mlp_ratio * config.dim
        self.item_transformer = _transformer(config.dim, config.item_layers, config.num_heads, mlp_dim)
        self.service_transformer = _transformer(config.dim, config.service_layers, config.num_heads, mlp_dim)
        self.head_norm = nn.LayerNorm(config.dim)
        self.head_in = nn.Linear(config.dim, config.head_ratio * config.dim)
        self.head_out = nn.Linear(config.head_ratio * config.dim, config.dim)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.load_state_dict(rival_weights(clue))

    def encode_items(self, tokens_NL: Tensor, is_token_NL: Tensor) -> Tensor:
        """Item vectors (N, D) of padded token sequences; the mask is False where padding stands."""
        position_L = torch.arange(tokens_NL.shape[1]).clamp(max=self.max_tokens - 1)
        x_NLD = self.token_embedding(tokens_NL) + self.token_position(position_L)
        return _encode(self.item_transformer, x_NLD, is_token_NL)

    def encode_histories(self, item_NLD: Tensor, is_event_NL: Tensor) -> Tensor:
        """User vectors (N, D), L2 norm 1, of padded histories of item vectors."""
        pooled_ND = _encode(self.service_transformer, item_NLD, is_event_NL)
        return F.normalize(pooled_ND + self.head_out(F.gelu(self.head_in(self.head_norm(pooled_ND)))), dim=-1)


class PaddedClue(PlainClue):
    """Everything padded: a history has `num_slots` event slots of `max_tokens` tokens, and all of them are computed."""

    def __init__(self, clue: Clue, num_slots: int = 64) -> None:
        super().__init__(clue)
        self.num_slots = num_slots

    def forward(self, batch: HistoryBatch) -> Tensor:
        """User vectors (H, D); histories hold at most `num_slots` events."""
        items_HS, is_event_HS = pad(batch.history_items, batch.history_offsets, self.num_slots)
        width = max(self.max_tokens, int(np.diff(batch.token_offsets).max()))
        tokens_UL, is_token_UL = pad(batch.tokens, batch.token_offsets, width)
        # Empty slots hold item 0: attention over nothing would be NaN.
        item_ND = self.encode_items(tokens_UL[items_HS.flatten()], is_token_UL[items_HS.flatten()])
        return self.encode_histories(item_ND.view(*items_HS.shape, -1), is_event_HS)


class SortedClue(PlainClue):
    """Valid slots alone, in micro-batches of similar length, as length-grouped batching of common trainers does.

    An item is computed as often as it occurs.
    """

    def __init__(self, clue: Clue, micro_batch_size: int = 256) -> None:
        super().__init__(clue)
        self.micro_batch_size = micro_batch_size

    def forward(self, batch: HistoryBatch) -> Tensor:
        """User vectors (H, D)."""
        starts, lengths = batch.token_offsets[batch.history_items], np.diff(batch.token_offsets)[batch.history_items]
        parts, orders = [], []
        for order in sorted_micro_batches(lengths, self.micro_batch_size):
            positions, offsets = gather_ranges(starts[order], lengths[order])
            parts.append(self.encode_items(*pad(batch.tokens[positions], offsets, int(lengths[order].max()))))
            orders.append(order)
        item_ED = _in_order(parts, orders)
        starts, lengths = batch.history_offsets[:-1], np.diff(batch.history_offsets)
        parts, orders = [], []
        for order in sorted_micro_batches(lengths, self.micro_batch_size):
            positions, offsets = gather_ranges(starts[order], lengths[order])
            events_NL, is_event_NL = pad(positions, offsets, int(lengths[order].max()))
            parts.append(self.encode_histories(F.embedding(events_NL, item_ED), is_event_NL))
            orders.append(order)
        return _in_order(parts, orders)


def rival_weights(clue: Clue) -> dict[str, Tensor]:
    """State of a `Clue` under the names of `PlainClue`."""
    state = {}
    for own_name, value in clue.state_dict().items():
        name = own_name.removeprefix("user_encoder.")
        if name == "logit_bias":  # the sigmoid loss alone has one
            continue
        if ".blocks." not in name:
            state[name] = value
            continue
        stack, _, layer, rest = name.split(".", 3)
        for ours, theirs in LAYER_NAMES.items():
            if rest == ours or rest.startswith(f"{ours}."):
                state[f"{stack}.layers.{layer}.{theirs}{rest[len(ours) :]}"] = value
    return state


def _transformer(dim: int, num_layers: int, num_heads: int, mlp_dim: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        dim, num_heads, mlp_dim, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)


def _encode(transformer: nn.TransformerEncoder, x_NLD: Tensor, is_valid_NL: Tensor) -> Tensor:
    """Mean over the valid positions, (N, D)."""
    # Without padding there is nothing to mask, and attention without a mask is faster.
    padding_NL = None if is_valid_NL.all() else ~is_valid_NL
    y_NLD = transformer(x_NLD, src_key_padding_mask=padding_NL)
    return (y_NLD * is_valid_NL[..., None]).sum(dim=1) / is_valid_NL.sum(dim=1, keepdim=True)


def _in_order(parts: list[Tensor], orders: list[np.ndarray]) -> Tensor:
    return F.embedding(torch.from_numpy(np.argsort(np.concatenate(orders))), torch.cat(parts))


def pad(values: np.ndarray, offsets: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
    """Ragged rows as a matrix (N, width) that is 0 behind their ends, and where it holds values."""
    is_valid_NL = np.arange(width) < np.diff(offsets)[:, None]
    padded_NL = np.zeros(is_valid_NL.shape, dtype=np.int64)
    padded_NL[is_valid_NL] = values
    return torch.from_numpy(padded_NL), torch.from_numpy(is_valid_NL)


def sorted_micro_batches(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Positions of sequences by rising length, `size` at a time."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def take_users(batch: HistoryBatch, start: int, stop: int) -> HistoryBatch:
    """Both views of users [start, stop) of a batch that holds all anchors, then all positives; the same dictionary."""
    num_users = (len(batch.history_offsets) - 1) // 2
    histories = np.concatenate([np.arange(start, stop), np.arange(num_users + start, num_users + stop)])
    positions, offsets = gather_ranges(batch.history_offsets[histories], np.diff(batch.history_offsets)[histories])
    return HistoryBatch(batch.tokens, batch.token_offsets, batch.history_items[positions], offsets, batch.item_keys)


def full_matrix_info_nce(anchor_BD: Tensor, positive_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE in plain autograd; stores the matrix of logits and what its gradient needs of it."""
    logits_BB = logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * anchor_BD @ positive_BD.T
    target_B = torch.arange(len(anchor_BD))
    return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2


def sentence_transformers_loss(mini_batch_size: int, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss step of CachedMultipleNegativesRankingLoss with both directions, without its encoder.

    Args:
        mini_batch_size: rows of the matrix at a time; its default is 32.
        scale: inverse temperature, which it does not learn.

    Returns:
        Function of anchors and positives (B, D), L2-normalised leaves, that returns the loss and sets their `grad`.
    """
    # Imported here: it takes seconds, and other benchmarks use this module too.
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    loss = CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()),  # pyright: ignore[reportArgumentType]  # its encoder, of which nothing is called
        scale=scale,
        similarity_fct=dot_score,  # the vectors have norm 1 already
        mini_batch_size=mini_batch_size,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )

    def step(anchor_BD: Tensor, positive_BD: Tensor) -> Tensor:
        # It gets its embeddings as lists of mini-batches, each a leaf.
        sides = [
            [part.detach().requires_grad_() for part in side_BD.split(mini_batch_size)]
            for side_BD in (anchor_BD, positive_BD)
        ]
        value = loss.calculate_loss(sides, with_backward=True)
        for side_BD, parts in zip((anchor_BD, positive_BD), sides, strict=True):
            side_BD.grad = torch.cat([part.grad for part in parts if part.grad is not None])
        return value

    return step
