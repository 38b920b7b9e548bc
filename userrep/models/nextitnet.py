"""NextItNet: item ids -> user vector, by residual blocks of causal dilated convolutions.

Source: Yuan et al. 2019 (arXiv 1808.05163), in the form of TERACON (Sein-Kim/TERACON@b48e074:teracon.py): a block is
x + adapt(relu(LN(conv(adapt(relu(LN(conv(x))))))), the second convolution with twice the dilation; the user vector is
the last position of the last block. No position embedding, no dropout.
Differs: computes no position twice and none that is not needed (`models/causal.py`), with the same result.

Legend: `B` users, `L` positions of a history, `N` positions that are computed, `D` width, `V` items.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.models.backbone import Adapter, Backbone
from userrep.models.causal import KERNEL_SIZE, CausalLayer, plan_causal

LAYER_NORM_EPS = 1e-8  # of the official code


class NextItNetConfig(Config):
    """Shape of the backbone; the defaults are those of TERACON on TTL."""

    dim: int = Field(default=256, ge=1)
    dilations: tuple[int, ...] = Field(default=(1, 4, 1, 4, 1, 4, 1, 4), min_length=1)  # of the blocks
    # A step costs as much as the items of its batch, not as the whole table: gradients of item embeddings are sparse,
    # and a step moves none but those of its items (`training/continual_step.py`).
    sparse_items: bool = False


class NextItNet(Backbone):
    """The backbone. Mask points are the outputs of its convolutions after the ReLU: two in a block."""

    def __init__(self, config: NextItNetConfig, num_items: int, item_VD: torch.Tensor | None = None) -> None:
        """Random initialisation from torch's global generator.

        Args:
            config: shape.
            num_items: V, the pad, number 0, included.
            item_VD: initial item embeddings, e.g. vectors of the items' texts; default: uniform within 1 / sqrt(V).
        """
        super().__init__()
        self.dim, self.num_points = config.dim, 2 * len(config.dilations)
        self.item_embedding = nn.Embedding(num_items, config.dim, sparse=config.sparse_items)
        self.blocks = nn.ModuleList(Block(config.dim) for _ in config.dilations)
        self._dilations = tuple(d * factor for d in config.dilations for factor in (1, 2))
        if item_VD is None:
            nn.init.uniform_(self.item_embedding.weight, -(num_items**-0.5), num_items**-0.5)
        else:
            self.item_embedding.weight.data.copy_(item_VD)

    def forward(self, items_BL: torch.Tensor, adapt: Adapter | None = None, last_only: bool = True) -> torch.Tensor:
        """User vectors; see `Backbone.forward`."""
        plan = plan_causal(items_BL, self._dilations, last_only)
        x_ND = self.item_embedding(plan.items)
        for number, block in enumerate(self.blocks):
            x_ND = cast(Block, block)(x_ND, *plan.layers[2 * number : 2 * number + 2], adapt, 2 * number)
        return F.embedding(plan.output, x_ND)

    def wiring(self) -> dict[str, tuple[int | None, int | None]]:
        """See `Backbone.wiring`; the second convolution of a block reads the first one's mask point."""
        points: dict[str, tuple[int | None, int | None]] = {"item_embedding.weight": (None, None)}
        for number, block in enumerate(self.blocks):
            for name, _ in block.named_parameters():
                layer = int(name.startswith(("conv2", "norm2")))
                reads = 2 * number if name == "conv2.weight" else None
                points[f"blocks.{number}.{name}"] = (2 * number + layer, reads)
        return points


class Block(nn.Module):
    """Two convolutions, each followed by layer normalisation and ReLU, around a residual connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # A convolution is a matrix over the positions that it reads, one after another, the oldest first.
        self.conv1 = nn.Linear(KERNEL_SIZE * dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.conv2 = nn.Linear(KERNEL_SIZE * dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(
        self, x_ND: torch.Tensor, first: CausalLayer, second: CausalLayer, adapt: Adapter | None, point: int
    ) -> torch.Tensor:
        """Args: point is the number of the block's first mask point. Returns the positions of `second`, (N', D)."""
        first_ND = F.relu(self.norm1(_convolve(self.conv1, x_ND, first)))
        changes = () if adapt is None else (partial(adapt, point),)
        hidden_ND = F.relu(self.norm2(_convolve(self.conv2, first_ND, second, *changes)))
        hidden_ND = hidden_ND if adapt is None else adapt(point + 1, hidden_ND)
        if len(hidden_ND) < len(x_ND):
            x_ND = F.embedding(first.kept[second.kept], x_ND)
        return x_ND + hidden_ND


def _convolve(
    conv: nn.Linear,
    x_ND: torch.Tensor,
    layer: CausalLayer,
    change: Callable[[torch.Tensor], torch.Tensor] = lambda x_ND: x_ND,
) -> torch.Tensor:
    """A convolution of what `change` makes of its input, (N_out, D).

    For the backward pass it keeps the input, not what is made of it, nor the three copies of that which it reads.
    """
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def read(x_ND: torch.Tensor) -> torch.Tensor:
        if dtype is None:
            return _read(change(x_ND), layer)
        # From float32, so that gradients of a position that many read, as they read a pad, are added up in it.
        return _read(change(x_ND).float(), layer).to(dtype)

    read_NX = read(x_ND)
    source_ND, address = x_ND.detach(), read_NX.data_ptr()  # the hooks must not keep the copies themselves

    def pack(saved: torch.Tensor) -> torch.Tensor | None:
        return None if saved.data_ptr() == address else saved

    def unpack(kept: torch.Tensor | None) -> torch.Tensor:
        if kept is not None:
            return kept
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):  # the backward pass is not
            return read(source_ND)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return conv(read_NX)


def _read(x_ND: torch.Tensor, layer: CausalLayer) -> torch.Tensor:
    """What each output position reads, (N_out, KERNEL_SIZE * D)."""
    return F.embedding(layer.taps, F.pad(x_ND, (0, 0, 1, 0))).flatten(1)
