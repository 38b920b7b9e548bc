"""What is said of a run before it is made, against the batches, the planner and the FLOP counter of a real one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness import count_flops
from tests.support.tokenized import User, write_shards
from userrep.data.augment import AugmentConfig
from userrep.data.stream import ShardSet, open_stream
from userrep.data.views import ViewConfig
from userrep.models.clue import Clue, ClueConfig, count_parameters
from userrep.models.cost import StepShape, step_cost
from userrep.scaling.workload import SAMPLED_USERS, TableWorkloads, Workload, read_samples
from userrep.training.encoding import MemoryConfig, MemoryPlanner
from userrep.training.objective import ClueObjective, LossConfig, step_shape

VOCAB = 1100
KINDS = ("time", "service")
AUGMENT = AugmentConfig(cut="random", min_keep=0.4, max_events=3, token_drop=0.2)
MODEL = ClueConfig(dim=16, num_heads=2, item_layers=2, service_layers=1, mlp_ratio=4)
SMALL = MemoryConfig.model_construct(budget_mib=0, chunk_size=300)  # less than a config may say: two chunks are kept

Table = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Eight row groups of 50 users; 300 items of which few are popular."""
    rng = np.random.default_rng(0)
    shards: list[list[list[User]]] = [[], []]
    for group in range(8):
        users = []
        for number in range(50):
            histories = {}
            for service in range(2):
                items = (rng.pareto(1.0, rng.integers(2, 12)) * 10 % 300).astype(int)
                histories[service] = [(f"item {item}", None) for item in items]
            users.append(User(f"user {group} {number}", "test" if number % 5 == 0 else "train", histories))
        shards[group % 2].append(users)
    directory = tmp_path_factory.mktemp("table")
    return directory, write_shards(directory, shards)


def workloads(table: Table, memory: MemoryConfig | None = None, **settings: Any) -> TableWorkloads:
    group, samples = read_samples(*table, KINDS, 10**6)
    return TableWorkloads(group, samples, VOCAB, AUGMENT, memory=memory, **settings)


@pytest.mark.parametrize("max_events", [2, 6])
def test_a_step_is_as_large_as_those_of_the_training_stream(table: Table, max_events: int) -> None:
    augment = AUGMENT.model_copy(update={"max_events": max_events})
    stream = open_stream([ShardSet(*table)], ViewConfig(kinds=KINDS), augment, 64, seed=5, num_steps=30)
    planner = MemoryPlanner(Clue(MODEL, VOCAB), SMALL)
    real = [step_shape(batch, planner.plan(batch), LossConfig()) for batch in stream.batches()]
    said = workloads(table, SMALL)(MODEL, 64, max_events).shape
    costs = np.array([step_cost(MODEL, shape).total_flops for shape in real])
    # Two means of about 30 batches, by the deviation of a batch; four of them is beyond luck.
    allowed = 4 * costs.std() * (64 / SAMPLED_USERS + 1 / 30) ** 0.5
    assert abs(step_cost(MODEL, said).total_flops - costs.mean()) <= allowed
    assert allowed < 0.06 * costs.mean()
    deviation_of_a_user = 64**0.5 * costs.std() / costs.mean()
    assert deviation_of_a_user / SAMPLED_USERS**0.5 < 0.01
    assert said.histories.count == 128


@pytest.mark.parametrize("form", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("memory", [MemoryConfig(), SMALL], ids=["whole", "chunks"])
def test_a_step_costs_what_torch_counts_when_it_is_taken(table: Table, memory: MemoryConfig, form: str) -> None:
    loss = LossConfig.parse({"form": form})
    said = workloads(table, memory, loss=loss)
    objective = ClueObjective(Clue(MODEL, VOCAB), loss=loss, memory=memory)
    cost = step_cost(MODEL, said(MODEL, 512, 4).shape)
    batches = said._draw(512, 4)
    objective(batches[0])  # the planner measures its first batch, once in a run
    counted = [count_flops(lambda batch=batch: objective(batch)[0].backward()) for batch in batches]
    assert cost.total_flops == pytest.approx(np.mean(counted), rel=1e-9)
    assert (cost.items.again > 0) == (memory == SMALL)


def test_batches_of_a_size_are_drawn_once_and_the_same_for_every_seed_of_torch(table: Table) -> None:
    first, again = workloads(table), workloads(table)
    torch.manual_seed(1)
    assert first(MODEL, 32, 4) == again(MODEL, 32, 4)
    wide = MODEL.model_copy(update={"dim": 32})
    assert first(wide, 32, 4).shape.items == first(MODEL, 32, 4).shape.items
    assert workloads(table, seed=1)(MODEL, 32, 4) != first(MODEL, 32, 4)


def test_memory_is_parameters_and_what_the_graph_holds(table: Table) -> None:
    found = workloads(table)
    small, large = found(MODEL, 16, 4), found(MODEL, 256, 4)
    fixed = 16 * count_parameters(Clue(MODEL, VOCAB))["total"]  # float32 weight, gradient and two moments

    def per_position(workload: Workload) -> float:
        vectors = 10 * 4 * MODEL.dim * (workload.shape.items.count + workload.shape.histories.count)
        return (workload.memory_bytes - fixed - vectors) / (
            workload.shape.items.positions + workload.shape.histories.positions
        )

    # Every position keeps, per layer, at least q k v, MLP hidden and its activation, of 3 + 4 + 4 widths.
    assert per_position(small) >= 11 * 4 * MODEL.dim
    assert per_position(large) == pytest.approx(per_position(small), rel=0.2)
    chunked = workloads(table, SMALL)(MODEL, 256, 4)
    assert fixed < chunked.memory_bytes <= large.memory_bytes


def test_encoders_of_the_largest_size_are_priced_without_being_made(table: Table) -> None:
    config = ClueConfig(dim=1408, num_heads=22, item_layers=22, service_layers=21, mlp_ratio=4)
    workload = workloads(table)(config, 64, 8)
    assert workload.memory_bytes > 16e9


def test_the_mean_step_is_that_of_the_batches(table: Table) -> None:
    found = workloads(table)
    planner = MemoryPlanner(Clue(MODEL, VOCAB), MemoryConfig())
    batches = found._draw(200, 3)
    assert [len(batch.user_keys) for batch in batches] == [200] * 11  # 2,048 users and what completes a batch
    shapes = [step_shape(batch, planner.plan(batch), LossConfig()) for batch in batches]
    assert found(MODEL, 200, 3).shape == StepShape.mean(shapes)


def test_no_more_is_read_than_is_needed(table: Table) -> None:
    _, few = read_samples(*table, KINDS, 100)
    _, everything = read_samples(*table, KINDS, 10**6)
    # A user has at least three samples: a pair of services, and the halves of two histories.
    assert 100 <= len(few.users) <= 120
    assert len(everything.users) == 8 * 40 * 3


def test_a_batch_beyond_what_was_read_is_refused(table: Table) -> None:
    with pytest.raises(ValueError, match="a batch of 1000 users cannot be drawn from the 960 samples"):
        workloads(table)(MODEL, 1000, 4)
