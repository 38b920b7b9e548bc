"""Runs of Recformer and of the two-tower model: what a user takes next, by the attributes of items."""

from pathlib import Path

from pipelines.config import JobConfig
from userrep.data.augment import AugmentConfig
from userrep.data.feature_vocabulary import FeatureConfig
from userrep.data.ingest import IngestConfig
from userrep.data.key_values import KeyValueConfig
from userrep.data.sources.parquet import ParquetSource
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.split import SplitConfig
from userrep.data.tokenizer import TokenizeConfig
from userrep.models.recformer import RecformerConfig
from userrep.models.two_tower import TwoTowerConfig
from userrep.training.optim import OptimConfig
from userrep.training.settings import RecformerPretraining, TwoTowerPretraining

DATA = Path("data")  # replaced by --data
WORLD = SyntheticSource(num_users=800, num_items=500)
ONE = IngestConfig(num_shards=1, row_group_size=256)  # so one actor embeds: half of a smoke run is starts of processes


def recformer_smoke() -> JobConfig:
    """Recformer through every stage in under a minute; its figures mean nothing.

    Command: `userrep run --config recformer_smoke --workdir DIR`.
    """
    return JobConfig(
        name="recformer_smoke",
        source=WORLD,
        ingest=ONE,
        tokenize=TokenizeConfig(vocab_size=512, attributes=KeyValueConfig(max_attribute_tokens=8)),
        pretrain=RecformerPretraining(
            model=RecformerConfig(dim=16, num_layers=1, num_heads=2, mlp_dim=32, window=8, max_items=8, max_tokens=48),
            augment=AugmentConfig(max_events=8, targets="later_half"),
            global_batch_size=32,
            num_steps=20,
            validate_every=10,
            pool_size=50,
        ),
    )


def two_tower_smoke() -> JobConfig:
    """The two-tower model through every stage in under a minute; its figures mean nothing.

    Command: `userrep run --config two_tower_smoke --workdir DIR`.
    """
    return JobConfig(
        name="two_tower_smoke",
        source=WORLD,
        ingest=ONE,
        tokenize=TokenizeConfig(
            vocab_size=512,
            features=(FeatureConfig(name="id", kind="id", dim=8), FeatureConfig(name="words", kind="bag", dim=8)),
        ),
        pretrain=TwoTowerPretraining(
            model=TwoTowerConfig(hidden_dims=(16, 8)),
            global_batch_size=64,
            num_steps=20,
            validate_every=10,
            pool_size=50,
        ),
    )


def recformer_amazon2014() -> JobConfig:
    """Recformer on reviews of beauty, sports and toys: the next item by the text of those before it.

    Command: `userrep run --config recformer_amazon2014 --data PATH/amazon2014_beauty_sports_toys --workdir DIR`.
    """
    return JobConfig(
        name="recformer_amazon2014",
        source=ParquetSource(path=DATA, text_columns=("title|keywords", "brand", "categories"), keep_attributes=True),
        tokenize=TokenizeConfig(attributes=KeyValueConfig()),
        pretrain=RecformerPretraining(
            model=RecformerConfig(dim=128, num_layers=2, num_heads=4, mlp_dim=512, max_items=20, max_tokens=256),
            augment=AugmentConfig(max_events=20, targets="later_half"),
            global_batch_size=64,
            num_steps=1500,
            validate_every=250,
        ),
    )


def recformer_amazon2018() -> JobConfig:
    """Reviews of one category of 2018, to fine-tune Recformer on; tokenize them as the encoder was trained.

    Command: `userrep STAGE --config recformer_amazon2018 --data PATH/amazon2018_office_products --workdir DIR
    --set tokenize.name=jobs/text/encoder/tokenizer.json`, STAGE being ingest, then tokenize; then
    `userrep finetune --from jobs/text/encoder --workdir DIR`.
    """
    return recformer_amazon2014().model_copy(
        update={
            "name": "recformer_amazon2018",
            "source": ParquetSource(path=DATA, text_columns=("title", "brand"), keep_attributes=True),
        }
    )


def two_tower_amazon2014() -> JobConfig:
    """The two-tower model on reviews of beauty, sports and toys: the next item given the last one.

    Command: `userrep run --config two_tower_amazon2014 --data PATH/amazon2014_beauty_sports_toys --workdir DIR`.
    """
    return JobConfig(
        name="two_tower_amazon2014",
        source=ParquetSource(path=DATA, text_columns=("title|keywords", "categories", "brand"), keep_attributes=True),
        tokenize=TokenizeConfig(
            features=(
                FeatureConfig(name="id", kind="id"),
                FeatureConfig(name="title", kind="bag", attribute="title", vocabulary_size=20_000),
                FeatureConfig(name="categories", kind="multi_hot", attribute="categories"),
                FeatureConfig(name="brand", kind="categorical", attribute="brand"),
            )
        ),
        pretrain=TwoTowerPretraining(
            num_steps=1000,
            validate_every=100,
            optim=OptimConfig(
                algorithm="adagrad", learning_rate=0.01, embedding_learning_rate=0.01, final_fraction=1.0
            ),
        ),
    )


def two_tower_yelp2019() -> JobConfig:
    """The two-tower model on Yelp reviews of 2019: the next place given the last one.

    Command: `userrep run --config two_tower_yelp2019 --data PATH/yelp2019 --workdir DIR`.
    """
    amazon = two_tower_amazon2014()
    return amazon.model_copy(
        update={
            "name": "two_tower_yelp2019",
            "source": ParquetSource(path=DATA, text_columns=("title", "categories"), keep_attributes=True),
            "ingest": IngestConfig(split=SplitConfig(validation=0.1, test=0.1)),
            "tokenize": TokenizeConfig(features=amazon.tokenize.features[:3]),
        }
    )
