"""Runs on public data sets, read from a path on this machine."""

from pathlib import Path

from pipelines.config import JobConfig
from userrep.data.augment import AugmentConfig
from userrep.data.ingest import IngestConfig
from userrep.data.sources.parquet import ParquetSource
from userrep.data.split import SplitConfig
from userrep.data.views import ViewConfig
from userrep.models.clue import ClueConfig
from userrep.training.objective import LossConfig
from userrep.training.optim import OptimConfig
from userrep.training.settings import CluePretraining

DATA = Path("data")  # replaced by --data


def parquet() -> JobConfig:
    """Any data set of events.parquet and items.parquet, with views by time; give its folder with --data."""
    return JobConfig(
        name="parquet",
        source=ParquetSource(path=DATA),
        pretrain=CluePretraining(
            views=ViewConfig(kinds=("time",)),
            augment=AugmentConfig(cut="random", max_events=12, token_drop=0.25),
            optim=OptimConfig(bag_steps=400),
            num_steps=1000,
            validate_every=100,
        ),
    )


def yelp2019() -> JobConfig:
    """Yelp reviews of 2019: a user's restaurants against the same user's shops and services.

    Command: `userrep run --config yelp2019 --data PATH/yelp2019 --workdir DIR`.
    """
    return JobConfig(
        name="yelp2019",
        source=ParquetSource(path=DATA, text_columns=("title", "categories")),
        pretrain=CluePretraining(
            model=ClueConfig(token_std=0.1, temperature_init=0.12),
            views=ViewConfig(kinds=("service", "mixed")),
            augment=AugmentConfig(cut="random", min_keep=0.3, max_events=12, token_drop=0.1),
            loss=LossConfig(negatives="batch"),  # `service` and `mixed` samples are negatives of each other
            optim=OptimConfig(bag_steps=500),
            num_steps=1600,
            validate_every=100,
        ),
    )


def amazon2014() -> JobConfig:
    """Amazon reviews of beauty, sports and toys: the earlier half of a user's purchases against the later half.

    Command: `userrep run --config amazon2014 --data PATH/amazon2014_beauty_sports_toys --workdir DIR`.
    """
    return JobConfig(
        name="amazon2014",
        source=ParquetSource(path=DATA, text_columns=("title|keywords", "categories", "brand")),
        pretrain=CluePretraining(
            views=ViewConfig(kinds=("time",)),
            augment=AugmentConfig(cut="random", max_events=12, token_drop=0.25),
            optim=OptimConfig(learning_rate=1e-3, bag_steps=400),
            num_steps=1500,
            validate_every=100,
        ),
    )


def ml1m() -> JobConfig:
    """MovieLens 1M: the earlier half of a user's ratings against the later half.

    Command: `userrep run --config ml1m --data PATH/ml1m_users1_2999 --workdir DIR`.
    """
    return JobConfig(
        name="ml1m",
        source=ParquetSource(path=DATA, text_columns=("title", "year", "genres")),
        ingest=IngestConfig(row_group_size=256, split=SplitConfig(validation=0.1, test=0.1)),
        pretrain=CluePretraining(
            model=ClueConfig(dim=64),
            views=ViewConfig(kinds=("time",)),
            augment=AugmentConfig(cut="random", min_keep=0.3, max_events=32, token_drop=0.1),
            optim=OptimConfig(bag_steps=100),
            global_batch_size=256,
            num_steps=300,
        ),
    )
