"""The CLUE encoder as a backbone of continual tasks: its item vectors stay as pretrained, its user encoder is taught.

Mask points are what attention and MLP of every Service Transformer block add, and what the head adds. Item vectors are
computed once, for all tasks and epochs: a step costs as much as its events, not as their tokens.

Legend: `B` users, `L` positions of a history, `E` events of all, `V` items with the pad, `D` width.
"""

import numpy as np
import torch
import torch.nn.functional as F

from userrep.models.backbone import Adapter, Backbone
from userrep.models.clue import ClueConfig, UserEncoder
from userrep.models.packing import pack


class ClueBackbone(Backbone):
    """User encoder over a table of item vectors. What blocks and head read is not at a mask point, as no mask closes
    what a residual stream carries.
    """

    def __init__(self, config: ClueConfig, item_VD: torch.Tensor) -> None:
        """Randomly initialised from torch's global generator.

        Args:
            config: of the encoder that the item vectors come from.
            item_VD: vector of every item, that of the pad first. It is no part of the state that is saved.
        """
        super().__init__()
        self.user_encoder = UserEncoder(config)
        self.dim, self.num_points = config.dim, self.user_encoder.num_points
        self.register_buffer("item_VD", item_VD, persistent=False)

    def forward(self, items_BL: torch.Tensor, adapt: Adapter | None = None, last_only: bool = True) -> torch.Tensor:
        """User vectors (B, D), not normalised; every history has an item at least.

        Raises:
            ValueError: `last_only=False`. CLUE reads a history in both directions, so it has no vectors of prefixes.
        """
        if not last_only:
            raise ValueError("CLUE has no vectors of prefixes: it cannot be taught a next_item task")
        is_item_BL = items_BL != 0
        borders = np.append(0, is_item_BL.sum(dim=1).cumsum(dim=0).cpu().numpy())
        packed = pack(borders)
        places_E = torch.from_numpy(packed.positions).to(items_BL.device)
        event_ED = F.embedding(items_BL[is_item_BL][places_E], self.get_buffer("item_VD"))
        vector_BD = self.user_encoder(event_ED, packed.chunks[0].groups, adapt=adapt)
        return vector_BD[torch.from_numpy(np.argsort(packed.order)).to(items_BL.device)]

    def wiring(self) -> dict[str, tuple[int | None, int | None]]:
        """Output matrices and biases of the branches compute a mask point; nothing reads one."""
        computed: dict[str, int] = {"user_encoder.head_out": self.num_points - 1}
        for layer in range(len(self.user_encoder.service_transformer.blocks)):
            block = f"user_encoder.service_transformer.blocks.{layer}"
            computed |= {f"{block}.attention_out": 2 * layer, f"{block}.mlp_out": 2 * layer + 1}
        return {name: (computed.get(name.rpartition(".")[0]), None) for name, _ in self.named_parameters()}
