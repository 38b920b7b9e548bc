"""Runs on the embedded synthetic world."""

from pipelines.config import EvaluateConfig, JobConfig, TeachConfig
from userrep.data.augment import AugmentConfig
from userrep.data.ingest import IngestConfig
from userrep.data.shard_tasks import ItemQuestion, LabelQuestion
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.tokenizer import TokenizeConfig
from userrep.models.clue import ClueConfig
from userrep.training.cells import TaskTraining
from userrep.training.optim import OptimConfig
from userrep.training.settings import CluePretraining


def demo() -> JobConfig:
    """The main job on 20,000 synthetic users of a search engine and a shop.

    Command: `make demo`, or `userrep run --config demo --workdir DIR`.
    """
    return JobConfig(
        name="demo",
        pretrain=CluePretraining(
            model=ClueConfig(dim=64),
            augment=AugmentConfig(cut="random", min_keep=0.3, max_events=16),
            optim=OptimConfig(learning_rate=1e-3, bag_steps=150),
            num_steps=500,
        ),
        teach=TeachConfig(
            questions=(
                ItemQuestion(service="shop"),
                LabelQuestion(label="gender"),
                LabelQuestion(label="age_band"),
            ),
            training=TaskTraining(batch_size=128, learning_rate=1e-3, max_epochs=6),
            max_users=3000,
        ),
        evaluate=EvaluateConfig(bag_of_tokens_steps=800, bag_of_tokens_dim=64),
    )


def smoke() -> JobConfig:
    """Every stage in about a minute, to see that an installation works; its figures mean nothing.

    Command: `userrep run --config smoke --workdir DIR`.
    """
    return JobConfig(
        name="smoke",
        source=SyntheticSource(num_users=1500),
        ingest=IngestConfig(num_shards=4, row_group_size=256),
        tokenize=TokenizeConfig(vocab_size=1024),
        pretrain=CluePretraining(
            model=ClueConfig(dim=16, num_heads=2),
            augment=AugmentConfig(max_events=16),
            optim=OptimConfig(bag_steps=5),
            global_batch_size=128,
            num_steps=20,
            validate_every=10,
            pool_size=100,
        ),
        teach=TeachConfig(
            questions=(ItemQuestion(service="shop", max_targets=1), LabelQuestion(label="gender")),
            training=TaskTraining(batch_size=128, learning_rate=1e-3, max_epochs=2),
            max_items=12,
        ),
        evaluate=EvaluateConfig(pool_size=100, bag_of_tokens_steps=20, bag_of_tokens_dim=16),
    )
