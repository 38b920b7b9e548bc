"""PeterRec: the first task trains the network, every later one small patches between its layers.

Source: Yuan et al., SIGIR 2020 (arXiv 2001.04253), and fajieyuan/sigir2020_peterrec: serial patches
x + up(gelu(down(x))) of width D / 8; patches, layer norms and the head of a task are trained. A sum over `cardinality`
branches of width D / (8 cardinality), as in the code, is one patch of width D / 8.
Differs: patches act on mask points, behind layer norm and ReLU; `up` starts at 0, so that a patch starts as the
identity; a task has its own copy of every layer norm at a mask point, not only of the second one in a block, and leaves
those of the other tasks as they are.

Legend: `N` positions, `D` width, `H` width of a patch.
"""

from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.continual.method import Method, Progress
from userrep.continual.network import Network, TaskSpec, Weights
from userrep.models.backbone import Adapter


class PeterRecConfig(Config):
    """Options of PeterRec."""

    reduction: int = Field(default=8, ge=1)  # D / H, rounded up


class Patch(nn.Module):
    """A residual bottleneck, at first the identity."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        return hidden_ND + self.up(F.gelu(self.down(hidden_ND)))


class PeterRec(Method):
    """A frozen network, and for each later task patches and layer norms; past tasks stay exactly as they were."""

    def __init__(self, network: Network, config: PeterRecConfig) -> None:
        super().__init__(network)
        self.config = config
        self.patches = nn.ModuleList()  # of all tasks but the first: one for each mask point
        self.norms = nn.ModuleList()  # of all tasks but the first: parameters in the order of `_norm_names`

    def begin_task(self, task: TaskSpec) -> None:
        """Freezes all there is; a later task gets patches, and copies of the layer norms."""
        if self.network.tasks:
            self.requires_grad_(False)
            backbone, like = self.network.backbone, next(self.network.parameters())
            hidden_dim = -(-backbone.dim // self.config.reduction)
            patches = nn.ModuleList(Patch(backbone.dim, hidden_dim) for _ in range(backbone.num_points))
            self.patches.append(patches.to(like.device, like.dtype))
            parameters = dict(backbone.named_parameters())
            # Parameters made of clones require gradients, whatever they are copies of.
            self.norms.append(nn.ParameterList(parameters[name].detach().clone() for name in self._norm_names()))
        super().begin_task(task)

    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the current task."""
        adapt, weights = self._patched(self.current)
        return self.network.loss(items_BL, labels_B, self.current, adapt, weights=weights), {}

    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Of a task, (B, D)."""
        return self.network.vectors(items_BL, number, *self._patched(number))

    def _patched(self, number: int) -> tuple[Adapter | None, Weights | None]:
        """What a task changes of the backbone."""
        if number == 0:
            return None, None
        patches, norms = cast(nn.ModuleList, self.patches[number - 1]), cast(nn.ParameterList, self.norms[number - 1])
        weights = dict(zip(self._norm_names(), norms, strict=True))
        return lambda point, hidden_ND: patches[point](hidden_ND), weights

    def _norm_names(self) -> list[str]:
        """Parameters of the backbone's layer norms that compute a mask point."""
        backbone = self.network.backbone
        wiring = backbone.wiring()
        names = (
            f"{module_name}.{name}"
            for module_name, module in backbone.named_modules()
            if isinstance(module, nn.LayerNorm)
            for name, _ in module.named_parameters()
        )
        return [name for name in names if wiring[name][0] is not None]
