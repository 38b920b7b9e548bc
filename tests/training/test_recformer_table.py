"""A model comes back from its table; a table of something else is refused."""

from pathlib import Path

import pytest
import torch

from tests.support.pretrained import write_encoder
from tests.support.recformer_job import make_job, write_recformer
from userrep.config import ConfigError
from userrep.manifest import IncompleteTableError
from userrep.training.checkpoint import MODEL_FILE
from userrep.training.recformer_table import load_recformer


def test_model_and_vocabulary_come_back(tmp_path: Path) -> None:
    written = write_recformer(tmp_path / "encoder", make_job(tmp_path / "job"))
    model, vocabulary = load_recformer(tmp_path / "encoder")
    assert model.config == written.config
    assert vocabulary.size == len(model.token_embedding.weight)
    for name, value in model.state_dict().items():
        assert torch.equal(value, written.state_dict()[name])
    with (tmp_path / "encoder" / MODEL_FILE).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(IncompleteTableError, match="bytes"):
        load_recformer(tmp_path / "encoder")


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "clue")
    with pytest.raises(ConfigError, match=r"pretrain\.system=recformer"):
        load_recformer(tmp_path / "clue")
