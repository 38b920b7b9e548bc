from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from userrep.config import Config
from userrep.data.sources.amazon import AmazonSource
from userrep.data.sources.catalog import SourceConfig
from userrep.data.sources.delimited import DelimitedSource
from userrep.data.sources.movielens import MovieLensSource
from userrep.data.sources.parquet import ParquetSource
from userrep.data.sources.synthetic import SyntheticSource

SOURCES = [
    SyntheticSource(seed=3, num_users=5),
    ParquetSource(path=Path("set"), text_columns=("title|keywords",)),
    DelimitedSource.parse({"path": "set", "users": {"labels": ["age"]}, "items": {"text": ["title"]}}),
    MovieLensSource(path=Path("set"), layout="1m"),
    AmazonSource(path=Path("set"), categories=("Beauty", "Toys")),
]


class Stage(Config):
    source: SourceConfig = SyntheticSource()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.kind)
def test_sources_survive_the_round_trip_through_plain_values(source: Any):
    plain = source.model_dump(mode="json")
    read = TypeAdapter(SourceConfig).validate_python(plain)
    assert read == source
    assert read.content_hash() == source.content_hash()
    assert Stage.parse({"source": plain}).source == source


def test_overrides_and_unknown_kinds():
    stage = Stage().with_overrides(["source.num_users=7", "source.seed=1"])
    assert stage.source == SyntheticSource(num_users=7, seed=1)
    with pytest.raises(ValidationError, match=r"synthetic.*parquet.*delimited.*movielens.*amazon"):
        Stage.model_validate({"source": {"kind": "excel"}})
