"""Every source there is: `kind` in a config chooses one."""

from typing import Annotated

from pydantic import Field

from userrep.data.sources.amazon import AmazonSource
from userrep.data.sources.delimited import DelimitedSource
from userrep.data.sources.movielens import MovieLensSource
from userrep.data.sources.parquet import ParquetSource
from userrep.data.sources.synthetic import SyntheticSource

SourceConfig = Annotated[
    SyntheticSource | ParquetSource | DelimitedSource | MovieLensSource | AmazonSource, Field(discriminator="kind")
]
