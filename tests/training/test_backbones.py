"""Backbones as configs name them: item vectors from texts, and what was pretrained."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from tests.support.pretrained import MODEL, TEXTS, pretrained_tasks, write_encoder
from userrep.config import ConfigError
from userrep.data.batch import HistoryBatch
from userrep.data.tasks import ItemSequences
from userrep.data.tokenizer import TOKENIZER_NAME
from userrep.manifest import IncompleteTableError, read_manifest
from userrep.models.clue_backbone import ClueBackbone
from userrep.models.nextitnet import NextItNet
from userrep.models.packing import Groups
from userrep.training.backbones import (
    EncoderTable,
    NextItNetBackbone,
    PretrainedClue,
    item_vectors,
    open_backbone,
)
from userrep.training.encoding import encode


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "encoder"
    write_encoder(path)
    return path


def sequences() -> ItemSequences:
    return pretrained_tasks().sequences


def text_only(texts: tuple[str, ...] | None) -> ItemSequences:
    """Items with these texts, whatever the sequences."""
    return replace(sequences(), texts=texts)


def tokens_of(encoder: Path, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(encoder / TOKENIZER_NAME))
    return tokenizer.encode(text, add_special_tokens=False).ids or [0]


@torch.no_grad()
def test_item_vectors_are_those_of_each_text_alone(encoder: Path, tmp_path: Path) -> None:
    clue = write_encoder(tmp_path / "same")
    lengths = {len(tokens_of(encoder, text)) for text in TEXTS[1:]}
    assert 1 in lengths
    assert max(lengths) == 6 > MODEL.max_tokens
    received = item_vectors(clue, encoder, sequences())
    assert received.shape == (len(TEXTS), MODEL.dim)
    assert not received[0].any()
    for text, vector in zip(TEXTS[1:], received[1:], strict=True):
        tokens = torch.tensor(tokens_of(encoder, text))
        [expected] = clue.encode_items(tokens, Groups(((1, len(tokens)),)))
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)
    # Which other items there are, and where, makes no difference.
    turned = item_vectors(clue, encoder, text_only(("", *TEXTS[:0:-1])))
    torch.testing.assert_close(turned[1:].flip(0), received[1:], rtol=1e-5, atol=1e-6)


def test_nextitnet_starts_from_item_vectors(encoder: Path, tmp_path: Path) -> None:
    config = NextItNetBackbone(dim=MODEL.dim, dilations=(1, 2), encoder=EncoderTable(path=encoder))
    source = open_backbone(config, sequences(), "cpu")
    one, two = source.new(), source.new()
    assert source.pretrained is None
    assert isinstance(one, NextItNet)
    assert isinstance(two, NextItNet)
    expected = item_vectors(write_encoder(tmp_path / "same"), encoder, sequences())
    assert torch.equal(one.item_embedding.weight, expected)
    assert one.item_embedding.weight.requires_grad
    assert not torch.equal(next(one.blocks.parameters()), next(two.blocks.parameters()))
    with torch.no_grad():
        one.item_embedding.weight.fill_(0)
    assert torch.equal(two.item_embedding.weight, expected)
    assert torch.equal(source.new().state_dict()["item_embedding.weight"], expected)


def test_without_an_encoder_all_is_random() -> None:
    torch.manual_seed(0)
    source = open_backbone(NextItNetBackbone(dim=6, dilations=(1,)), text_only(None), "cpu")
    one, two = source.new(), source.new()
    assert source.pretrained is None
    assert one.dim == 6
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True) if a.ndim > 1)


@torch.no_grad()
def test_the_pretrained_state_gives_the_vectors_of_the_encoder(encoder: Path, tmp_path: Path) -> None:
    """Against the encoder over the tokens of every history, as users are embedded."""
    clue, table = write_encoder(tmp_path / "same"), sequences()
    source = open_backbone(PretrainedClue(encoder=EncoderTable(path=encoder)), table, "cpu")
    backbone = source.new()
    assert isinstance(backbone, ClueBackbone)
    assert (backbone.dim, backbone.num_points) == (MODEL.dim, 2 * MODEL.service_layers + 1)
    items, tokens = torch.from_numpy(table.items).long(), [tokens_of(encoder, text) for text in TEXTS]
    histories = [row[row > 0] for row in table.items]
    batch = HistoryBatch(
        tokens=np.concatenate(tokens).astype(np.int32),
        token_offsets=np.cumsum([0, *map(len, tokens)]).astype(np.int32),
        history_items=np.concatenate(histories),
        history_offsets=np.cumsum([0, *map(len, histories)]).astype(np.int32),
        item_keys=np.arange(len(tokens)),
    )
    expected = encode(clue, batch)
    new = F.normalize(backbone(items), dim=-1)
    assert (new - expected).abs().max() > 0.1
    assert source.pretrained is not None
    backbone.load_state_dict(dict(source.pretrained))
    torch.testing.assert_close(F.normalize(backbone(items), dim=-1), expected, rtol=1e-5, atol=1e-6)


def test_backbones_share_item_vectors_and_nothing_else(encoder: Path) -> None:
    source = open_backbone(PretrainedClue(encoder=EncoderTable(path=encoder)), sequences(), "cpu")
    one, two = source.new(), source.new()
    assert one.get_buffer("item_VD").data_ptr() == two.get_buffer("item_VD").data_ptr()
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}
    assert source.pretrained is not None
    one.load_state_dict(dict(source.pretrained))
    with torch.no_grad():
        next(one.parameters()).fill_(7)
    assert not any((value == 7).all() for value in source.pretrained.values())


@pytest.mark.parametrize("kind", ["nextitnet", "clue"])
def test_what_does_not_fit_is_a_config_error(kind: str, encoder: Path, tmp_path: Path) -> None:
    def open_with(table: EncoderTable, known: ItemSequences, dim: int = MODEL.dim) -> None:
        is_clue = kind == "clue"
        config = PretrainedClue(encoder=table) if is_clue else NextItNetBackbone(dim=dim, encoder=table)
        open_backbone(config, known, "cpu")

    with pytest.raises(ConfigError, match="items of this data set have no texts"):
        open_with(EncoderTable(path=encoder), text_only(None))
    digest = read_manifest(encoder).digest()
    open_with(EncoderTable(path=encoder, digest=digest), sequences())
    shutil.copytree(encoder, tmp_path / "moved")
    open_with(EncoderTable(path=tmp_path / "moved", digest=digest), sequences())
    write_encoder(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=f"other is encoder .*, and {digest} is needed: it was trained anew"):
        open_with(EncoderTable(path=tmp_path / "other", digest=digest), sequences())
    with pytest.raises(IncompleteTableError, match=r"holds no manifest\.json"):
        open_with(EncoderTable(path=tmp_path / "missing"), sequences())
    if kind == "nextitnet":
        with pytest.raises(ConfigError, match=r"backbone\.dim is 16, and the item vectors of the encoder have 8"):
            open_with(EncoderTable(path=encoder), sequences(), dim=16)


def test_an_encoder_is_pinned_by_its_place_and_its_digest(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(encoder.parent)
    expected = EncoderTable(path=encoder.resolve(), digest=read_manifest(encoder).digest())
    pinned = EncoderTable(path=Path("encoder")).pinned()
    assert pinned == expected == pinned.pinned()
    with pytest.raises(ConfigError, match="is needed: it was trained anew"):
        EncoderTable(path=encoder, digest="0" * 12).pinned()


def test_a_pretrained_backbone_needs_its_encoder() -> None:
    with pytest.raises(ConfigError, match="encoder: Field required"):
        PretrainedClue.parse({"kind": "clue"})
    with pytest.raises(ConfigError, match="an encoder needs a path"):
        PretrainedClue.parse({"kind": "clue", "encoder": {}})
    with pytest.raises(ConfigError, match=f"encoder {'0' * 12} is needed, and not where it lies"):
        EncoderTable(digest="0" * 12).pinned()
