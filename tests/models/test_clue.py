"""What the encoder says about itself."""

from userrep.models.clue import Clue, ClueConfig, count_parameters

VOCAB = 50


def test_parameter_count() -> None:
    counts = count_parameters(Clue(ClueConfig(dim=8, num_heads=2, item_layers=1, service_layers=2, mlp_ratio=4), VOCAB))
    # per block: 2 layer norms (2 * 2D), attention 4 (D*D + D), MLP 2 * 4D*D + 4D + D
    blocks = 3 * (4 * 8 + 4 * (64 + 8) + 2 * 4 * 64 + 32 + 8)
    head = 2 * 8 + 2 * 2 * 64 + 2 * 8 + 8
    assert counts["non_embedding"] == blocks + head + 2  # and temperature and bias of the logits
    assert counts["total"] == counts["non_embedding"] + counts["embedding"]
