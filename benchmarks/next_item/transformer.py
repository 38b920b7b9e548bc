"""The transformer that the trained rivals share, on short padded sequences.

Legend: `B` sequences, `L` places, `D` width, `H` heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LAYERS, NUM_HEADS = 2, 2
EMBEDDING_STD = 0.02


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each normalised before and added after."""

    def __init__(self, dim: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.attention_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp_in, self.mlp_out = nn.Linear(dim, mlp_ratio * dim), nn.Linear(mlp_ratio * dim, dim)
        self.dropout = dropout

    def forward(self, x_BLD: Tensor, mask_BLL: Tensor | None) -> Tensor:
        """Same shape. Without a mask, a place attends to itself and what is before it."""
        heads = self.query_key_value(self.attention_norm(x_BLD)).unflatten(-1, (3, NUM_HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_BLL, dropout_p=rate, is_causal=mask_BLL is None
        )
        x_BLD = x_BLD + self._drop(self.attention_out(mixed.transpose(1, 2).flatten(2)))
        return x_BLD + self._drop(self.mlp_out(self._drop(F.gelu(self.mlp_in(self.mlp_norm(x_BLD))))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class SequenceTransformer(nn.Module):
    """Item vectors with positions, counted back from the sequence's end, through blocks.

    So the place that is asked has the same position in every history, however much longer it is than in training.

    Args:
        dim: width D.
        max_items: longest sequence.
        mlp_ratio: width of the perceptrons over D.
        dropout: in [0, 1).
        is_causal: whether a place sees only what is before it.
    """

    def __init__(self, dim: int, max_items: int, mlp_ratio: int, dropout: float, is_causal: bool) -> None:
        super().__init__()
        self.position = nn.Embedding(max_items, dim)
        self.input_norm, self.output_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, mlp_ratio, dropout) for _ in range(NUM_LAYERS))
        self.dropout, self.is_causal = dropout, is_causal

    def forward(self, item_BLD: Tensor, items_BL: Tensor) -> Tensor:
        """Hidden states (B, L, D).

        Args:
            item_BLD: vectors of the items, whatever stands behind the end of a sequence.
            items_BL: the items, 0 behind the end.
        """
        is_item_BL = items_BL > 0
        from_end_BL = is_item_BL.sum(dim=1, keepdim=True) - 1 - torch.arange(items_BL.shape[1])
        x_BLD = self.input_norm(item_BLD + self.position(from_end_BL.clamp(min=0)))
        x_BLD = F.dropout(x_BLD, self.dropout, self.training)
        # Causal attention does not reach what stands behind the end.
        mask_BLL = None if self.is_causal else is_item_BL[:, None, None, :]
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_BLL)
        return self.output_norm(x_BLD)


def init_weights(model: nn.Module) -> None:
    """Embeddings of std 0.02, matrices by Xavier, zero biases, norms as they are.

    At these widths, matrices of std 0.02 would begin with attention that is the same everywhere.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def at_last_item(hidden_BLD: Tensor, items_BL: Tensor) -> Tensor:
    """Hidden state of each sequence's last item, (B, D); rows of `items_BL` are 0 behind their ends."""
    last_B = (items_BL > 0).sum(dim=1) - 1
    return hidden_BLD[torch.arange(len(hidden_BLD)), last_B]
