"""Products and activations whose rows do not depend on what else is computed with them, bit for bit, on a CPU.

A matrix product picks its kernel by the number of rows, and an elementwise kernel rounds what is left over after its
last full vector otherwise than the rest (measured with torch 2.13 on AVX-512: rows of a product of fewer than 8 rows
differ from those of a larger one, and a fifth of the values of GELU). So a user's vector would depend, in its last
bits, on who else is in the batch. Under `RowStable` every product has the same number of rows, activations are computed
in whole vectors, and there is one thread, because how threads share the work depends on its size too.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

ROWS = 256  # of every product; as fast as thousands at width 128
LANES = 64  # values; a multiple of what any kernel handles at once


class RowStable(TorchFunctionMode):
    """Within this block, linear layers and GELU give a row the same bits in any batch. For inference alone."""

    def __enter__(self) -> Self:
        """One thread from here on."""
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """As many threads as before."""
        super().__exit__(*error)
        torch.set_num_threads(self._threads)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replaces the two functions, and leaves all others as they are."""
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func is F.gelu:
            return _in_whole_vectors(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows_PX, weight_XY = input.reshape(-1, weight.shape[1]), weight.t()
    out_PY = rows_PX.new_empty(len(rows_PX), len(weight))
    bias_Y = weight.new_zeros(len(weight)) if bias is None else bias
    for start in range(0, len(rows_PX), ROWS):
        block, out = rows_PX[start : start + ROWS], out_PY[start : start + ROWS]
        if len(block) == ROWS:
            torch.addmm(bias_Y, block, weight_XY, out=out)
        else:
            padded = block.new_zeros(ROWS, weight.shape[1])
            padded[: len(block)] = block
            out.copy_(torch.addmm(bias_Y, padded, weight_XY)[: len(block)])
    return out_PY.unflatten(0, input.shape[:-1]) if input.dim() != 2 else out_PY


@torch.no_grad()
def _in_whole_vectors(func: Callable[..., torch.Tensor], input: torch.Tensor, **options: Any) -> torch.Tensor:
    missing = -input.numel() % LANES
    if not missing and input.is_contiguous():
        return func(input, **options)
    flat = F.pad(input.reshape(-1), (0, missing))
    return func(flat, **options)[: input.numel()].view(input.shape)
