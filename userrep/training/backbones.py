"""Backbones of continual tasks as a config names them, with what was pretrained.

Legend: `V` items with the pad, `D` width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from userrep import storage
from userrep.config import Config, ConfigError
from userrep.data.tasks import ItemSequences
from userrep.data.tokenizer import TOKENIZER_NAME, tokenize
from userrep.manifest import read_manifest
from userrep.models.backbone import Backbone
from userrep.models.clue import Clue
from userrep.models.clue_backbone import ClueBackbone
from userrep.models.nextitnet import NextItNet, NextItNetConfig
from userrep.training.checkpoint import load_encoder
from userrep.training.encoding import encode_items


class EncoderTable(Config):
    """A committed encoder table, as `userrep pretrain` writes it."""

    path: Path | None = None  # where it lies here; no part of what identifies a cell, and not in what a cell leaves
    digest: str = ""  # of its manifest; part of what identifies a cell, so that another encoder is another cell

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.path is None and not self.digest:
            raise ValueError("an encoder needs a path: give that of the table that `userrep pretrain` has written")
        return self

    def pinned(self) -> Self:
        """With an absolute path and the digest of what is there.

        Raises:
            ConfigError: there is another encoder than that of the digest, or the path is not known.
            IncompleteTableError: there is none.
        """
        if self.path is None:
            raise ConfigError(f"encoder {self.digest} is needed, and not where it lies: set backbone.encoder.path")
        path = storage.fetch(self.path.resolve())
        received = read_manifest(path).digest()
        if self.digest not in ("", received):
            raise ConfigError(f"{path} is encoder {received}, and {self.digest} is needed: it was trained anew since")
        return self.model_copy(update={"path": path, "digest": received})


class NextItNetBackbone(NextItNetConfig):
    """NextItNet; its item embeddings start at random, or as the item vectors of an encoder of the same width."""

    kind: Literal["nextitnet"] = "nextitnet"
    encoder: EncoderTable | None = None


class PretrainedClue(Config):
    """The user encoder of CLUE over its item vectors; the first task is what it was pretrained for."""

    kind: Literal["clue"] = "clue"
    encoder: EncoderTable


BackboneConfig = Annotated[NextItNetBackbone | PretrainedClue, Field(discriminator="kind")]


@dataclass(frozen=True)
class BackboneSource:
    """Makes backbones.

    Attributes:
        new: makes a freshly initialised one, from torch's global generator.
        pretrained: the state that the first task starts from, where it was trained before.
    """

    new: Callable[[], Backbone]
    pretrained: Mapping[str, torch.Tensor] | None = None


def open_backbone(config: NextItNetBackbone | PretrainedClue, sequences: ItemSequences, device: str) -> BackboneSource:
    """Reads what the config names, and computes item vectors where they are asked for.

    Args:
        config: which backbone.
        sequences: whose items it embeds; with texts where there is an encoder.
        device: to compute item vectors on.

    Raises:
        ConfigError: another encoder than that of the digest or of another width, or items without texts.
    """
    if config.encoder is None:
        assert isinstance(config, NextItNetBackbone)
        return BackboneSource(partial(NextItNet, config, sequences.num_items))
    directory = config.encoder.pinned().path
    assert directory is not None
    clue = load_encoder(directory).to(device)
    item_VD = item_vectors(clue, directory, sequences)
    if isinstance(config, NextItNetBackbone):
        if config.dim != clue.dim:
            raise ConfigError(f"backbone.dim is {config.dim}, and the item vectors of the encoder have {clue.dim}")
        return BackboneSource(partial(NextItNet, config, sequences.num_items, item_VD))
    new = partial(ClueBackbone, clue.config, item_VD)
    state = {f"user_encoder.{name}": value for name, value in clue.user_encoder.state_dict().items()}
    return BackboneSource(new, state)


def item_vectors(clue: Clue, directory: Path, sequences: ItemSequences) -> torch.Tensor:
    """Vectors of all items from their texts, (V, D); that of the pad is zero.

    Raises:
        ConfigError: the data set has no texts.
    """
    if sequences.texts is None:
        raise ConfigError("items of this data set have no texts: an encoder cannot embed them, use none")
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_NAME))
    ids = tokenize(tokenizer, list(sequences.texts[1:]))
    offsets = np.cumsum([0, *map(len, ids)])
    vector_VD = encode_items(clue, np.concatenate(ids), offsets)
    return torch.cat([torch.zeros_like(vector_VD[:1]), vector_VD])
