"""From a batch to user vectors: pack, encode every unique item once, then the histories, both in chunks.

Legend: `U` unique items, `T` their tokens, `H` histories, `E` their events, `D` width. A position is a token or event.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from userrep.config import Config
from userrep.data.batch import HistoryBatch
from userrep.losses.grad_cache import encode_in_chunks, measure_graph
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.models.clue import Clue
from userrep.models.packing import Chunk, pack

Encoder = Clue | BagOfTokens

# A chunk's largest tensor: several times the cache, so that matrix products run at full speed, and far below 32 MiB,
# from where on glibc takes memory from the kernel and gives it back every time (pipelines/records/LOG.md).
MAX_TENSOR_BYTES = 8 * 2**20
# Item and user vectors exist in so many copies at the peak: pieces, the whole, gradients of both, those of the loss.
# Measured as the growth of the peak from 1,024 to 8,192 users (pipelines/records/contrastive_engine_cpu2_202611.md).
COPIES_OF_VECTORS = 10
INFERENCE_CHUNK = 2048  # positions encoded at once where no graph is kept


class MemoryConfig(Config):
    """Memory of a training step. The result does not depend on it."""

    budget_mib: int = Field(
        default=4096, ge=64
    )  # of each worker, for activations; more of it means less computed twice
    chunk_size: int | Literal["auto"] = "auto"  # positions encoded at once; auto: the most that fit


@dataclass(frozen=True)
class ChunkPlan:
    """How a batch is encoded: positions of a chunk, and how many chunks keep their graph for the backward pass."""

    chunk_size: int
    num_kept: int

    def kept(self, num_history_chunks: int) -> tuple[int, int]:
        """How many of the last chunks of items, and of histories, keep their graph."""
        # Histories come last in the forward pass, so their graphs are the first that the backward pass gives back.
        histories = max(1, min(self.num_kept - 1, num_history_chunks))
        return max(1, self.num_kept - histories), histories


ONE_BY_ONE = ChunkPlan(INFERENCE_CHUNK, 1)


def encode(model: Encoder, batch: HistoryBatch, plan: ChunkPlan = ONE_BY_ONE, use_blocks: bool = True) -> torch.Tensor:
    """User vectors (H, D) of all histories of a batch.

    Args:
        model: the encoder.
        batch: histories over a dictionary of items.
        plan: how many tokens, or events, are encoded at once; of no influence on the result.
        use_blocks: False leaves the transformer blocks out.
    """
    device = model.logit_scale.device
    items, histories = pack(batch.token_offsets, plan.chunk_size), pack(batch.history_offsets, plan.chunk_size)
    tokens_T = _indices(batch.tokens[items.positions], device)
    references_E = _indices(np.argsort(items.order)[batch.history_items[histories.positions]], device)

    def encode_items(chunk: Chunk) -> torch.Tensor:
        return model.encode_items(tokens_T[chunk.positions], chunk.groups, use_blocks)

    def encode_histories(item_UD: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return model.encode_histories(item_UD, references_E[chunk.positions], chunk.groups, use_blocks)

    kept_items, kept_histories = plan.kept(len(histories.chunks))
    item_UD = encode_in_chunks(encode_items, items.chunks, kept_items)
    user_HD = encode_in_chunks(partial(encode_histories, item_UD), histories.chunks, kept_histories)
    return F.embedding(_indices(np.argsort(histories.order), device), user_HD)


def encoded_twice(batch: HistoryBatch, plan: ChunkPlan) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the items, and of the histories, that a training step encodes a second time for their graph."""
    item_chunks, history_chunks = (
        [np.diff(offsets)[packed.order[chunk.sequences]] for chunk in packed.chunks]
        for offsets in (batch.token_offsets, batch.history_offsets)
        for packed in (pack(offsets, plan.chunk_size),)
    )
    kept_items, kept_histories = plan.kept(len(history_chunks))
    none = np.zeros(0, dtype=np.int32)
    return (
        np.concatenate([none, *item_chunks[: max(0, len(item_chunks) - kept_items)]]),
        np.concatenate([none, *history_chunks[: max(0, len(history_chunks) - kept_histories)]]),
    )


@torch.no_grad()
def encode_items(model: Clue, tokens: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
    """Vectors of items, (U, D), without a graph.

    Args:
        model: the encoder.
        tokens: ids of all items, one after another, (T,).
        offsets: borders of the items in `tokens`, (U + 1,).
    """
    packed = pack(offsets, INFERENCE_CHUNK)
    tokens_T = _indices(tokens[packed.positions], model.logit_scale.device)
    parts = [model.encode_items(tokens_T[chunk.positions], chunk.groups) for chunk in packed.chunks]
    return torch.cat(parts)[_indices(np.argsort(packed.order), model.logit_scale.device)]


class MemoryPlanner:
    """Fits the encoding of batches into a memory budget."""

    def __init__(self, model: Encoder, config: MemoryConfig) -> None:
        self._model, self._config = model, config
        self.bytes_per_position, self._largest_per_position = 0.0, 0.0

    def plan(self, batch: HistoryBatch) -> ChunkPlan:
        """The largest chunks, and as many of their graphs, as the budget holds; two chunks at least.

        What a position needs is measured on the first batch: the tensors that autograd saves for it.
        """
        if not self.bytes_per_position:
            self._measure(batch)
        num_vectors = len(batch.token_offsets) + len(batch.history_offsets)
        budget = self._config.budget_mib * 2**20 - COPIES_OF_VECTORS * num_vectors * self._model.dim * 4
        chunk_size = self._config.chunk_size
        if chunk_size == "auto":
            chunk_size = int(max(1, budget) / (3 * self.bytes_per_position))
            if self._model.logit_scale.device.type == "cpu":
                chunk_size = min(chunk_size, int(MAX_TENSOR_BYTES / self._largest_per_position))
            chunk_size = max(1, chunk_size)
        # One chunk's worth is left for the chunk that is computed again and for gradients on their way.
        num_kept = math.floor(budget / (chunk_size * self.bytes_per_position)) - 1
        return ChunkPlan(chunk_size, max(2, num_kept))

    def describe(self) -> str:
        """Budget, and what was measured against it."""
        per_position = self.bytes_per_position / 1024
        return f"budget {self._config.budget_mib:,} MiB for activations of {per_position:,.0f} KiB per position"

    def _measure(self, batch: HistoryBatch) -> None:
        model, scale = self._model, self._model.logit_scale
        item_1D = scale.new_zeros(1, model.dim)
        for offsets, encode_chunk in (
            (batch.token_offsets, model.encode_items),
            (batch.history_offsets, partial(model.encode_histories, item_1D)),
        ):
            chunk = pack(offsets, INFERENCE_CHUNK).chunks[-1]
            num_positions = chunk.positions.stop - chunk.positions.start
            indices = torch.zeros(num_positions, dtype=torch.int64, device=scale.device)
            size = measure_graph(partial(encode_chunk, indices, chunk.groups))
            self.bytes_per_position = max(self.bytes_per_position, size.total_bytes / num_positions)
            self._largest_per_position = max(self._largest_per_position, size.largest_bytes / num_positions)


def _indices(values: np.ndarray, device: torch.device) -> torch.Tensor:
    # int64: what every torch index operation accepts; the copy also gives torch memory that it may write to.
    return torch.from_numpy(values.astype(np.int64)).to(device)
