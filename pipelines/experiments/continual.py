"""Experiments with continual tasks."""

from pathlib import Path

from pipelines.continual_config import ContinualJobConfig, MethodChoice, Ml1mTasks, SyntheticTasks, reverse
from userrep.data.sources.parquet import ParquetSource
from userrep.data.sources.synthetic import SyntheticSource
from userrep.training.backbones import NextItNetBackbone
from userrep.training.cells import ContinualConfig, TaskTraining

DATA = Path("data")  # replaced by --data
ML1M_ORDER = ("T1", "T2", "T3", "T4", "T5", "T6")


def smoke() -> ContinualJobConfig:
    """All methods on a few hundred made-up users: a minute, and no result that means anything."""
    few = {"max_epochs": 2, "learning_rate": 1e-3}
    return ContinualJobConfig(
        name="smoke",
        tasks=SyntheticTasks(source=SyntheticSource(num_users=400, num_items=500), max_items=12, max_targets=2),
        training=ContinualConfig(
            backbone=NextItNetBackbone(dim=16, dilations=(1, 2)),
            first=TaskTraining(batch_size=32, **few),
            later=TaskTraining(batch_size=64, **few),
        ),
    )


def synthetic() -> ContinualJobConfig:
    """All methods on the synthetic world: search, product, topic, department, gender and age of 2,000 users."""
    return ContinualJobConfig(name="synthetic")


def ml1m() -> ContinualJobConfig:
    """All methods on MovieLens 1M in the ML protocol, original and reversed order, 3 seeds; needs --data.

    Command: `userrep continual --config ml1m --data PATH/ml1m_users1_2999 --workdir DIR`.
    """
    return ContinualJobConfig(
        name="ml1m",
        tasks=Ml1mTasks(source=ParquetSource(path=DATA)),
        orders=(ML1M_ORDER, reverse(ML1M_ORDER)),
        seeds=(0, 1, 2),
    )


def ml1m_sampling() -> ContinualJobConfig:
    """TERACON on MovieLens 1M with all, few and none of a batch's users rehearsing past tasks; needs --data.

    In the working directory of `ml1m` its cells join those of that experiment.
    """
    options = ({}, {"sampling": "all"}, {"sampling": "minimum"}, {"retention_weight": 0})
    methods = tuple(MethodChoice(name="teracon", options=choice) for choice in options)
    return ml1m().model_copy(update={"name": "ml1m_sampling", "methods": methods, "orders": (ML1M_ORDER,)})
