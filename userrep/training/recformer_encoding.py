"""From a batch to Recformer's vectors: sequences are packed, sorted by length, and encoded in chunks.

Legend: `H` sequences, `P` their tokens, `M` masked tokens, `D` width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from userrep.data.item_sequences import TokenSequences
from userrep.data.word_masking import MaskedSequences
from userrep.losses.grad_cache import encode_in_chunks, measure_graph
from userrep.models.packing import Chunk, Pack, pack
from userrep.models.recformer import Recformer
from userrep.training.encoding import INFERENCE_CHUNK, MAX_TENSOR_BYTES, ChunkPlan, MemoryConfig


@dataclass(frozen=True)
class Part:
    """A chunk of sorted sequences with its tokens.

    Attributes:
        chunk: which sequences.
        tokens: embeddings of the tokens, (P, D).
        types: as in `TokenSequences`, (P,).
        items: item positions as in `TokenSequences`, (P,).
        masked: positions of the masked tokens in the chunk, (M,).
    """

    chunk: Chunk
    tokens: torch.Tensor
    types: torch.Tensor
    items: torch.Tensor
    masked: torch.Tensor


@torch.no_grad()
def encode_sequences(model: Recformer, sequences: TokenSequences, chunk_size: int = INFERENCE_CHUNK) -> torch.Tensor:
    """Vectors of sequences without a graph, (H, D), L2 norm 1.

    Args:
        model: the encoder.
        sequences: of users or of items; an item is a history of one event.
        chunk_size: tokens that are encoded at once; of no influence on the result.
    """
    return encode_with_graph(model, sequences, ChunkPlan(chunk_size, num_kept=1))


def encode_with_graph(model: Recformer, sequences: TokenSequences, plan: ChunkPlan) -> torch.Tensor:
    """Vectors of sequences with graph, (H, D), L2 norm 1.

    Args:
        model: the encoder.
        sequences: of users or of items.
        plan: how many tokens are encoded at once, and how many chunks keep their graph.
    """
    packed = pack(sequences.offsets, plan.chunk_size)
    device = model.token_embedding.weight.device
    tokens_P = torch.from_numpy(sequences.tokens[packed.positions]).to(device)
    parts = _parts(model.token_embedding(tokens_P), sequences, packed, np.zeros(len(tokens_P), dtype=bool))
    return _vectors(encode_in_chunks(partial(_pooled, model), list(parts), plan.num_kept), packed)


def encode_for_training(
    model: Recformer, sequences: TokenSequences, masked: MaskedSequences, plan: ChunkPlan
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Both passes of a step, with graph: whole sequences for their vectors, masked ones for the language model.

    Args:
        model: the encoder.
        sequences: as they are.
        masked: the same with hidden words.
        plan: how many tokens are encoded at once, and how many chunks keep their graph.

    Returns:
        Vectors (H, D), L2 norm 1; features (M, D) of the masked tokens, which the output matrix turns into logits; and
        for each of these its index in `masked.positions`, (M,).
    """
    packed = pack(sequences.offsets, plan.chunk_size)
    device = model.token_embedding.weight.device
    order_P = packed.positions
    is_masked = np.zeros(len(order_P), dtype=bool)
    is_masked[masked.positions] = True
    # One look-up for both passes: its gradient is as large as the embedding, so there should be but one.
    both = np.concatenate([sequences.tokens[order_P], masked.sequences.tokens[order_P]])
    whole_PD, hidden_PD = model.token_embedding(torch.from_numpy(both).to(device)).chunk(2)
    parts = list(_parts(whole_PD, sequences, packed, is_masked))
    masked_parts = list(_parts(hidden_PD, sequences, packed, is_masked))
    # The masked pass comes last, so its graphs are the first that the backward pass gives back.
    num_masked = max(1, min(plan.num_kept - 1, len(parts)))
    pooled_HD = encode_in_chunks(partial(_pooled, model), parts, max(1, plan.num_kept - num_masked))
    feature_MD = encode_in_chunks(partial(_features, model), masked_parts, num_masked)
    rank_P = np.cumsum(is_masked) - 1
    return _vectors(pooled_HD, packed), feature_MD, rank_P[order_P[is_masked[order_P]]]


class RecformerPlanner:
    """Fits the encoding of batches into a memory budget."""

    def __init__(self, model: Recformer, config: MemoryConfig) -> None:
        self._model, self._config = model, config
        self._bytes_per_token, self._largest_per_token = 0.0, 0.0

    def plan(self, sequences: TokenSequences) -> ChunkPlan:
        """The largest chunks, and as many of their graphs, as the budget holds; a chunk of each pass at least.

        What a token needs is measured on the longest sequence of the first batch: the tensors that autograd saves.
        """
        if not self._bytes_per_token:
            self._measure(sequences)
        weight = self._model.token_embedding.weight
        # Embeddings of both passes, and their gradients.
        budget = self._config.budget_mib * 2**20 - 4 * len(sequences.tokens) * self._model.dim * weight.element_size()
        chunk_size = self._config.chunk_size
        if chunk_size == "auto":
            chunk_size = max(1, int(max(1, budget) / (3 * self._bytes_per_token)))
            if weight.device.type == "cpu":
                chunk_size = max(1, min(chunk_size, int(MAX_TENSOR_BYTES / self._largest_per_token)))
        return ChunkPlan(chunk_size, max(2, int(budget / (chunk_size * self._bytes_per_token)) - 1))

    def describe(self) -> str:
        """Budget, and what was measured against it."""
        per_token = self._bytes_per_token / 1024
        return f"budget {self._config.budget_mib:,} MiB for activations of {per_token:,.0f} KiB per token"

    def _measure(self, sequences: TokenSequences) -> None:
        chunk = pack(sequences.offsets, 1).chunks[-1]
        num_tokens, device = chunk.positions.stop - chunk.positions.start, self._model.token_embedding.weight.device
        zeros_P = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        with torch.no_grad():
            token_PD = self._model.token_embedding(zeros_P)
        part = Part(chunk, token_PD, zeros_P, zeros_P, zeros_P[1:])
        size = measure_graph(partial(_features, self._model, part))
        self._bytes_per_token = size.total_bytes / num_tokens
        self._largest_per_token = size.largest_bytes / num_tokens


def _parts(token_PD: torch.Tensor, sequences: TokenSequences, packed: Pack, is_masked: np.ndarray) -> Iterator[Part]:
    device, chunks = token_PD.device, packed.chunks
    types_P, items_P = (
        torch.from_numpy(part[packed.positions]).to(device) for part in (sequences.types, sequences.item_positions)
    )
    is_masked_P = is_masked[packed.positions]
    # One split, not slices: the gradient of k slices is k tensors of full size.
    sizes: Sequence[int] = [chunk.positions.stop - chunk.positions.start for chunk in chunks]
    for chunk, tokens in zip(chunks, token_PD.split(sizes), strict=True):
        span = chunk.positions
        masked_M = torch.from_numpy(np.flatnonzero(is_masked_P[span])).to(device)
        yield Part(chunk, tokens, types_P[span], items_P[span], masked_M)


def _pooled(model: Recformer, part: Part) -> torch.Tensor:
    layout = model.lay_out(part.chunk.groups)
    return model.pooled(model.embed(part.tokens, part.types, part.items, layout), layout)


def _features(model: Recformer, part: Part) -> torch.Tensor:
    layout = model.lay_out(part.chunk.groups)
    hidden_MD = model.hidden_at(model.embed(part.tokens, part.types, part.items, layout), layout, part.masked)
    return model.head(hidden_MD)


def _vectors(pooled_HD: torch.Tensor, packed: Pack) -> torch.Tensor:
    """In the order of the batch, L2 norm 1, in float32 at least."""
    sequences = torch.from_numpy(np.argsort(packed.order)).to(pooled_HD.device)
    return F.normalize(pooled_HD[sequences].to(torch.promote_types(pooled_HD.dtype, torch.float32)), dim=-1)
