"""Every size of the ladder builds and dry-runs without memory; every derivation is printed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from userrep.data.batch import HistoryBatch
from userrep.models.clue import Clue, ClueConfig, count_parameters
from userrep.scaling.ladder import (
    MAX_DEVIATION,
    MAX_PARAMETERS,
    MIN_PARAMETERS,
    derive_batch_size,
    derive_learning_rates,
    derive_samples,
    make_rung,
)
from userrep.scaling.rules import BatchRule, DurationRule, LadderConfig, PowerRule, RateRule
from userrep.training.encoding import ChunkPlan, encode
from userrep.training.optim import OptimConfig
from userrep.training.settings import CluePretraining

HALF_DECADES = [10**exponent for exponent in np.arange(4, 9.1, 0.5).tolist()]
BATCH = HistoryBatch(
    tokens=np.zeros(13, dtype=np.int32),
    token_offsets=np.array([0, 5, 6, 13], dtype=np.int32),
    history_items=np.array([0, 1, 2, 2, 1, 0, 1], dtype=np.int32),
    history_offsets=np.array([0, 1, 4, 7], dtype=np.int32),
    item_keys=np.arange(3),
)


@pytest.mark.parametrize("size", [1e4, 1e5, 1e6, 1e7, 1e8, 1e9], ids=lambda size: f"{size:.0e}")
def test_every_size_builds_and_dry_runs_on_no_memory(size: float) -> None:
    rung = make_rung(size, LadderConfig())
    with torch.device("meta"):
        model = Clue(rung.model, vocab_size=50_000)
        users_HD = encode(model, BATCH, ChunkPlan(6, 2))
        users_HD.sum().backward()
    assert users_HD.shape == (3, rung.model.dim)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.ndim)
    assert count_parameters(model)["non_embedding"] == rung.num_parameters


@settings(deadline=None, max_examples=60)
@given(st.floats(math.log(MIN_PARAMETERS), math.log(MAX_PARAMETERS)))
def test_any_size_comes_near_what_was_asked_for(log_size: float) -> None:
    size = min(max(math.exp(log_size), MIN_PARAMETERS), MAX_PARAMETERS)
    rung = make_rung(size, LadderConfig())
    model = rung.model
    assert abs(rung.num_parameters / size - 1) <= MAX_DEVIATION
    assert model.dim % (8 * model.num_heads) == 0
    assert min(model.item_layers, model.service_layers) >= 1
    assert 0 <= model.item_layers - model.service_layers <= 1
    assert rung.num_samples == rung.num_steps * rung.global_batch_size


def test_everything_grows_with_the_size() -> None:
    rungs = [make_rung(size, LadderConfig()) for size in HALF_DECADES]
    for smaller, larger in zip(rungs, rungs[1:], strict=False):
        assert smaller.num_parameters < larger.num_parameters
        assert smaller.model.dim < larger.model.dim
        assert smaller.global_batch_size < larger.global_batch_size
        assert smaller.num_samples < larger.num_samples
        assert smaller.learning_rate > larger.learning_rate
    # Wide enough for two blocks at the aspect ratio, it keeps it.
    for rung in rungs[4:]:
        blocks = rung.model.item_layers + rung.model.service_layers
        assert 32 / 1.25 <= rung.model.dim / blocks <= 32 * 1.25


def test_the_defaults_at_the_reference_are_those_of_training() -> None:
    optim, pretrain = OptimConfig(), CluePretraining()
    rates = derive_learning_rates(pretrain.model.dim, pretrain.global_batch_size, RateRule())
    assert [rate.value for rate in rates] == [optim.learning_rate, optim.embedding_learning_rate]
    assert derive_batch_size(BatchRule().reference_parameters, BatchRule()).value == pretrain.global_batch_size
    assert DurationRule().min_steps == pretrain.num_steps


def test_rates_follow_the_powers_of_their_rule() -> None:
    rule = RateRule(
        reference_dim=64,
        reference_batch_size=100,
        matrices=PowerRule(value=0.01, width_exponent=-1, batch_exponent=0.5),
        embeddings=PowerRule(value=0.1, width_exponent=0.25, batch_exponent=1),
    )
    assert [rate.value for rate in derive_learning_rates(64, 100, rule)] == [0.01, 0.1]
    assert [rate.value for rate in derive_learning_rates(4 * 64, 100, rule)] == [0.0025, 0.1414]
    assert [rate.value for rate in derive_learning_rates(64, 400, rule)] == [0.02, 0.4]


def test_batches_are_rounded_and_durations_whole() -> None:
    rule = BatchRule(reference_parameters=1e6, batch_size=512, exponent=0.5)
    assert [derive_batch_size(size, rule).value for size in (1e4, 1e6, 2e6, 4e6)] == [64, 512, 736, 1024]
    assert derive_batch_size(10, rule).value == 32
    duration = DurationRule(tokens_per_parameter=20, tokens_per_sample=50, min_steps=10)
    assert derive_samples(1e6, 300, duration).value == 300 * 1334  # 400,000 samples
    assert derive_samples(1e3, 300, duration).value == 300 * 10


def test_every_value_is_printed_with_formula_and_source() -> None:
    rung = make_rung(3e6, LadderConfig())
    derived = {derivation.name: derivation for derivation in rung.derivations}
    for name in ("item_layers", "service_layers", "num_heads", "mlp_ratio", "head_ratio"):
        assert derived[name].value == getattr(rung.model, name)
    assert derived["width D"].value == rung.model.dim
    assert derived["blocks L"].value == rung.model.item_layers + rung.model.service_layers
    assert derived["global_batch_size B"].value == rung.global_batch_size
    assert derived["learning_rate"].value == rung.learning_rate
    assert derived["embedding_learning_rate"].value == rung.embedding_learning_rate
    assert derived["samples"].value == rung.num_samples
    text = rung.describe()
    for derivation in rung.derivations:
        assert derivation.formula in text
        assert derivation.source
        assert derivation.source in text
    assert f"{rung.num_parameters:,}" in text


def test_what_was_not_measured_is_said_to_be_an_assumption() -> None:
    def assumed(config: LadderConfig) -> set[str]:
        return {d.name for d in make_rung(1e6, config).derivations if d.is_assumption}

    rates, batch, samples = {"learning_rate", "embedding_learning_rate"}, {"global_batch_size B"}, {"samples"}
    assert assumed(LadderConfig()) == rates | batch | samples
    assert make_rung(1e6, LadderConfig()).describe().count("ASSUMPTION") == 4
    measured = LadderConfig(rate=RateRule(measured_in="sweep 17"), duration=DurationRule(measured_in="sweep 18"))
    assert assumed(measured) == batch
    assert "sweep 17" in make_rung(1e6, measured).describe()


def test_settings_that_are_not_the_ladders_are_kept() -> None:
    base = ClueConfig(max_tokens=77, temperature_init=0.2, token_std=0.1)
    model = make_rung(1e5, LadderConfig(mlp_ratio=2), base).model
    assert (model.max_tokens, model.temperature_init, model.token_std, model.mlp_ratio) == (77, 0.2, 0.1, 2)


@pytest.mark.parametrize("size", [0, 9_999, 1.1e9, float("nan")])
def test_sizes_beyond_the_ladder_are_refused(size: float) -> None:
    with pytest.raises(ValueError, match="not on the ladder: choose a size between 10,000 and 1,000,000,000"):
        make_rung(size, LadderConfig())
