"""Scaling-law sweeps: star designs around a center, and the small designs beside them."""

from pipelines.config import JobConfig
from pipelines.experiments import public, synthetic
from pipelines.sweep_config import SweepConfig
from userrep.data.augment import AugmentConfig
from userrep.data.sources.synthetic import SyntheticSource
from userrep.scaling.grid import Center, GridConfig
from userrep.scaling.rules import LadderConfig, PowerRule, RateRule
from userrep.training.cell_evaluation import EvaluationConfig
from userrep.training.optim import OptimConfig
from userrep.training.settings import CluePretraining

OPTIM = OptimConfig(schedule="wsd", warmup_steps=20)
SYNTHETIC_RATES = RateRule(
    matrices=PowerRule(value=2.955e-3, width_exponent=-0.490, batch_exponent=0.655),
    embeddings=PowerRule(value=2.954e-2, width_exponent=0.510, batch_exponent=0.655),
    measured_in="`rates_synthetic`, pipelines/records/scaling_synthetic_cpu2_202611.md",
)
AMAZON_RATES = RateRule(
    matrices=PowerRule(value=6.905e-4, width_exponent=-1.691, batch_exponent=0.752),
    embeddings=PowerRule(value=6.904e-3, width_exponent=-0.691, batch_exponent=0.752),
    measured_in="`rates_amazon2014`, pipelines/records/scaling_amazon2014_cpu2_202611.md",
)


def sweep_smoke() -> SweepConfig:
    """Six tiny cells, to see that sweeps work here; their laws mean nothing."""
    job = synthetic.smoke()
    pretrain = job.clue.model_copy(update={"optim": OPTIM.model_copy(update={"warmup_steps": 2})})
    return SweepConfig(
        name="sweep_smoke",
        job=job.model_copy(update={"name": "sweep_smoke", "pretrain": pretrain}),
        grids=(
            GridConfig(
                design="star",
                center=Center(parameters=2e4, samples=2048, max_events=8, batch_size=64),
                parameters=(1e4, 4e4),
                samples=(1024, 4096),
                batch_sizes=(128,),
                users="all",
            ),
        ),
        evaluation=EvaluationConfig(pool_size=100, num_probe_train=200, num_probe_test=100),
    )


def sweep_synthetic() -> SweepConfig:
    """Model, samples, history length and batch on 100,000 synthetic users: 27 cells in about half an hour.

    Command: `userrep sweep run --config sweep_synthetic --workdir DIR`.
    """
    job = JobConfig(
        name="sweep_synthetic",
        source=SyntheticSource(num_users=100_000),
        pretrain=CluePretraining(augment=AugmentConfig(cut="random", max_events=16), optim=OPTIM),
    )
    return SweepConfig(
        name="sweep_synthetic",
        job=job,
        grids=(
            GridConfig(
                design="star",
                center=Center(parameters=1e5, samples=65_536, max_events=16, batch_size=256),
                parameters=(1e4, 2.2e4, 4.6e4, 2.2e5, 4.6e5, 1e6),
                samples=(4096, 8192, 16_384, 32_768, 131_072, 262_144),
                max_events=(1, 2, 4, 8, 32),
                batch_sizes=(32, 64, 128, 512, 1024),
            ),
            _small_batch((2.2e4, 4.6e5), 65_536, 16),
        ),
        ladder=LadderConfig(rate=SYNTHETIC_RATES),
    )


def sweep_amazon2014() -> SweepConfig:
    """Model, samples, history length and batch on Amazon reviews of beauty, sports and toys; needs --data.

    Command: `userrep sweep run --config sweep_amazon2014 --data PATH/amazon2014_beauty_sports_toys --workdir DIR`.
    """
    job = public.amazon2014()
    return SweepConfig(
        name="sweep_amazon2014",
        job=job.model_copy(update={"pretrain": job.clue.model_copy(update={"optim": OPTIM})}),
        grids=(
            GridConfig(
                design="star",
                center=Center(parameters=1e5, samples=32_768, max_events=8, batch_size=256),
                parameters=(1e4, 2.2e4, 4.6e4, 2.2e5, 4.6e5, 1e6),
                samples=(2048, 4096, 8192, 16_384, 65_536, 131_072),
                max_events=(1, 2, 4, 16),
                batch_sizes=(32, 64, 128, 512, 1024),
            ),
            _small_batch((2.2e4, 4.6e5), 32_768, 8),
        ),
        ladder=LadderConfig(rate=AMAZON_RATES),
    )


def rates_synthetic() -> SweepConfig:
    """Short runs of small encoders at several learning rates: what the ladder's rule of learning rates is fitted to.

    Command: `userrep sweep run --config rates_synthetic --workdir DIR`, then `userrep sweep learning-rate`.
    """
    return _rates(sweep_synthetic(), 32_768, 16)


def rates_amazon2014() -> SweepConfig:
    """The same on Amazon reviews; needs --data."""
    return _rates(sweep_amazon2014(), 16_384, 8)


def _rates(sweep: SweepConfig, samples: int, max_events: int) -> SweepConfig:
    shared = {"design": "full", "samples": (samples,), "max_events": (max_events,)}
    factors = (0.5, 1.0, 2.0, 4.0, 8.0)
    grids = (
        GridConfig(**shared, parameters=(1e4, 1e5), batch_sizes=(256,), learning_rate_factors=factors),
        GridConfig(**shared, parameters=(2.2e4,), batch_sizes=(64, 256), learning_rate_factors=factors),
    )
    evaluation = sweep.evaluation.model_copy(update={"probe_labels": False, "probe_next_item": False})
    return sweep.model_copy(
        update={
            "name": sweep.name.replace("sweep", "rates"),
            "grids": grids,
            "evaluation": evaluation,
            "ladder": LadderConfig(),
        }
    )


def _small_batch(parameters: tuple[float, ...], samples: int, max_events: int) -> GridConfig:
    """Models at the smallest and the largest batch: does a larger one help at a small batch?"""
    return GridConfig(
        design="full",
        parameters=parameters,
        samples=(samples,),
        max_events=(max_events,),
        batch_sizes=(32, 1024),
    )
