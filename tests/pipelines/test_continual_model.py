"""A finished model in the registry: published, and taught its next tasks in another working directory."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from typer.testing import CliRunner

from pipelines import continual_model as module
from pipelines.cli import app
from pipelines.continual import CONTINUAL, Planned
from pipelines.continual_config import ContinualJobConfig, MethodChoice, ShardTasks
from pipelines.continual_model import MODELS, Model, check_publishing, continued, publish_model, pull_model
from pipelines.experiments.catalog import load_continual_config
from tests.support.ingested import SERVICES, draw_shards
from tests.support.pretrained import write_encoder
from tests.support.tiny_cell import Points, assert_same_state, method_state, timeless
from tests.support.tokenized import write_ingested
from userrep.config import ConfigError
from userrep.data.shard_tasks import ItemQuestion, LabelQuestion
from userrep.data.task_digests import digest_prefixes
from userrep.data.tasks import TaskSet
from userrep.manifest import IncompleteTableError
from userrep.publishing.client import pull
from userrep.publishing.connection import RegistryError, UnknownTableError, connect
from userrep.training.backbones import EncoderTable, PretrainedClue
from userrep.training.cells import METHOD_FILE, ContinualConfig, TaskTraining, choose_tasks, read_cell
from userrep.training.continual import run_cell

# SQLAlchemy 2.1 deprecates a loading option that MLflow 3.17 uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")
SMALL = [
    "tasks.source.num_users=150",
    "training.first.max_epochs=1",
    "training.later.max_epochs=1",
    "workers.threads=1",
]
OLD, NEW = ("T1", "T5"), ("T1", "T5", "T6")


def config_of(
    *overrides: str, methods: str = "", orders: tuple[str, ...] = (), seeds: str = "", model: Model | None = None
) -> ContinualJobConfig:
    cell = None if model is None else model.cell
    return load_continual_config("smoke", None, [*SMALL, *overrides], methods, list(orders), seeds, cell)


def teach(config: ContinualJobConfig, directory: Path, lender: Path | None = None) -> tuple[Planned, list[str]]:
    """The config's one cell, taught without Ray; and the tasks that steps were taken for."""
    config, points = config.pinned(), Points()
    (cell,) = config.cells(tasks := config.build_tasks(config.seeds[0]))
    run_cell(cell, tasks, directory, points, lenders=[] if lender is None else [lender])
    return Planned(cell, directory), list(dict.fromkeys(point.tasks[0] for point in points.of("train/")))


def assert_same_cells(own: Path, other: Path) -> None:
    one, two = read_cell(own), read_cell(other)
    assert np.array_equal(one.scores_MM, two.scores_MM, equal_nan=True)
    assert timeless(one) == timeless(two)
    for number in range(len(one.lessons)):
        assert_same_state(method_state(own, number), method_state(other, number))


def publish(planned: Planned, target: str, workdir: Path, uri: str, experiment: str = "tests"):
    (workdir / CONTINUAL).mkdir(parents=True, exist_ok=True)
    return publish_model(planned, target, experiment, workdir, uri)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the worker has: sums of floats depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Registry:
    """A team that has taught a model and published it."""

    uri: str
    workdir: Path
    planned: Planned


@pytest.fixture(scope="module")
def registry(empty_mlflow_db: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    workdir = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{shutil.copyfile(empty_mlflow_db, workdir / 'mlflow.db')}"
    config = config_of("methods=[{name: teracon, options: {sampling: all}}]", orders=(",".join(OLD),), seeds="3")
    planned, _ = teach(config, workdir / CONTINUAL / "experiment" / "cells" / "old")
    made = publish(planned, "tasks@first", workdir, uri)
    assert (made.name, made.version, made.alias) == ("tasks", 1, "first")
    return Registry(uri, workdir, planned)


@pytest.fixture(scope="module")
def model(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pull_model("tasks@first", tmp_path_factory.mktemp("elsewhere"), registry.uri)


def test_a_published_model_is_a_ready_version_and_nothing_else_is_left(registry: Registry) -> None:
    client = MlflowClient(registry.uri, registry.uri)
    version = client.get_model_version_by_alias("tasks", "first")
    logged = client.get_logged_model(version.tags["model_id"])
    assert logged.status == "READY"
    assert logged.params["order"] == version.tags["order"] == "T1,T5"
    final = read_cell(registry.planned.directory).lessons[-1].scores
    assert {m.key: m.value for m in logged.metrics or []} == {
        "final/T1/mrr_at_5": final["T1"],
        "final/T5/accuracy": final["T5"],
    }
    assert sorted(path.name for path in (registry.workdir / CONTINUAL).iterdir()) == ["experiment"]
    # A second time there is no second version; without an alias it is `champion`.
    again = publish(registry.planned, "tasks", registry.workdir, registry.uri)
    assert (again.version, again.alias) == (1, "champion")


@pytest.mark.parametrize("reference", ["tasks@first", "tasks/1", "tasks@v1"])
def test_a_model_is_pulled_whole_and_once(
    reference: str, registry: Registry, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = pull_model(reference, tmp_path, registry.uri)
    assert pulled.directory == tmp_path / CONTINUAL / MODELS / "tasks-v1"
    assert [path.name for path in pulled.directory.parent.iterdir()] == ["tasks-v1"]
    assert (pulled.cell, pulled.data_digests) == (registry.planned.cell, model.data_digests)
    assert_same_cells(pulled.directory, registry.planned.directory)
    monkeypatch.setattr("userrep.publishing.client.download", lambda *_: pytest.fail("downloaded"))
    assert pull_model(reference, tmp_path, registry.uri) == pulled


def test_a_model_whose_files_have_changed_in_the_registry_is_not_taken(registry: Registry, tmp_path: Path) -> None:
    """Nothing of it can be seen in the working directory."""
    client = MlflowClient(registry.uri, registry.uri)
    location = client.get_model_version_download_uri("tasks", "1").removeprefix("file://")
    path = Path(location) / "task-01" / METHOD_FILE
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(IncompleteTableError, match="is not what was published, nothing was kept"):
            pull_model("tasks@first", tmp_path, registry.uri)
    finally:
        path.write_bytes(content)
    assert not list((tmp_path / CONTINUAL / MODELS).iterdir())


def test_continued_elsewhere_is_bit_for_bit_taught_in_one_go(registry: Registry, model: Model, tmp_path: Path) -> None:
    config = continued(config_of(orders=(",".join(NEW),), model=model), model)
    assert config.methods == (MethodChoice(name="teracon", options={"sampling": "all"}),)
    planned, taught = teach(config, tmp_path / "continued", model.directory)
    assert taught == ["T6"]
    alone, all_taught = teach(config, tmp_path / "alone")
    assert all_taught == list(NEW)
    assert_same_cells(planned.directory, alone.directory)
    # And the continued one is a model of its own, to go on from.
    assert publish(planned, "tasks@next", registry.workdir, registry.uri).version == 2
    assert pull_model("tasks@next", tmp_path, registry.uri).cell.order == NEW


@pytest.mark.ray
def test_the_command_line_continues_a_model(
    registry: Registry, model: Model, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = [word for override in SMALL for word in ("--set", override)]
    arguments = ["continual", "--config", "smoke", *words, "--workdir", str(tmp_path / "new")]
    arguments += ["--tracking-uri", registry.uri, "--continue-from", "tasks@first", "--order", ",".join(NEW)]
    result = CliRunner().invoke(app, [*arguments, "--publish", "cli@stable"], catch_exceptions=False)
    assert "cli@stable is version 1" in result.stderr
    (directory,) = (tmp_path / "new" / CONTINUAL).glob("*/cells/*")
    config = continued(config_of(orders=(",".join(NEW),), model=model), model)
    alone, _ = teach(config, tmp_path / "alone")
    assert_same_cells(directory, alone.directory)
    borrowed = [(directory / f"task-{number:02d}" / "manifest.json").read_text() for number in range(3)]
    assert ["tasks-v1" in text for text in borrowed] == [True, True, False]
    assert not (tmp_path / "new" / "mlflow.db").exists()
    client = MlflowClient(registry.uri, registry.uri)
    run = client.get_run(client.get_model_version_by_alias("cli", "stable").run_id)
    assert run.data.params["method"] == "teracon"


def test_without_an_order_all_tasks_follow_that_the_model_does_not_have(model: Model) -> None:
    assert continued(config_of(model=model), model).orders == (("T1", "T5", "T2", "T3", "T4", "T6"),)
    several = continued(config_of(orders=("T1,T5,T6", "T1,T5,noise,T2"), model=model), model)
    assert several.orders == (NEW, ("T1", "T5", "noise", "T2"))


def test_what_the_command_says_again_may_be_said(model: Model) -> None:
    config = config_of("training.patience=5", methods="teracon", seeds="3", model=model)
    assert continued(config, model).methods[0].options == {"sampling": "all"}


@pytest.mark.parametrize(
    ("overrides", "methods", "seeds", "message"),
    [
        ((), "hat", "", "method is 'hat', and 'teracon' of tasks version 1: leave it out"),
        ((), "teracon,hat", "", "options.sampling is None, and 'all'"),
        ((), "", "4", "seed is 4, and 3 of tasks version 1"),
        ((), "", "3,4", "seed is 4, and 3"),
        (
            ("methods=[{name: teracon, options: {sampling: minimum}}]",),
            "",
            "",
            "options.sampling is 'minimum', and 'all'",
        ),
        (("training.later.learning_rate=0.5",), "", "", r"training.later.learning_rate is 0.5, and 0.001 of"),
    ],
)
def test_other_settings_are_refused(
    overrides: tuple[str, ...], methods: str, seeds: str, message: str, model: Model
) -> None:
    with pytest.raises(ConfigError, match=message):
        continued(config_of(*overrides, methods=methods, seeds=seeds, model=model), model)


@pytest.mark.parametrize("order", ["T1,T5", "T1", "T5,T1,T6", "T1,T6,T5"])
def test_an_order_that_does_not_go_on_is_refused(order: str, model: Model) -> None:
    with pytest.raises(ConfigError, match="does not go on from tasks version 1, which was taught T1 > T5"):
        continued(config_of(orders=(order,), model=model), model)


def test_a_model_that_has_all_tasks_has_nothing_to_learn(model: Model) -> None:
    cell = model.cell.model_copy(update={"order": ("T1", "T5", "T2", "T3", "T4", "T6")})
    tasks = config_of(model=model).build_tasks(cell.seed)
    every = replace(model, cell=cell, data_digests=digest_prefixes(tasks, choose_tasks(cell, tasks), False))
    with pytest.raises(ConfigError, match="tasks version 1 was taught all tasks of this data set"):
        continued(config_of(model=every), every)


def test_other_data_of_past_tasks_are_refused_by_name(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the data of task T1, or the item histories of its users, are not those"):
        continued(config_of("tasks.source.seed=5", model=model), model)
    build = ContinualJobConfig.build_tasks

    def relabelled(config: ContinualJobConfig, seed: int = 0) -> TaskSet:
        tasks = build(config, seed)
        changed = [replace(t, labels=t.labels[::-1].copy()) if t.name == "T5" else t for t in tasks.tasks]
        return replace(tasks, tasks=tuple(changed))

    monkeypatch.setattr(ContinualJobConfig, "build_tasks", relabelled)
    with pytest.raises(ConfigError, match="the data of task T5 are not those that tasks version 1 was taught"):
        continued(config_of(model=model), model)


def test_past_tasks_must_be_in_the_data_set(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    build = ContinualJobConfig.build_tasks

    def fewer(config: ContinualJobConfig, seed: int = 0) -> TaskSet:
        tasks = build(config, seed)
        return replace(tasks, tasks=tuple(task for task in tasks.tasks if task.name != "T5"))

    monkeypatch.setattr(ContinualJobConfig, "build_tasks", fewer)
    with pytest.raises(ConfigError, match="was taught T5, and this data set has the tasks T1, T2"):
        continued(config_of(model=model), model)


def test_a_joint_or_unknown_method_cannot_be_continued(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, _ = teach(config_of(methods="mtl", orders=(",".join(OLD),)), tmp_path / "mtl")
    publish(planned, "joint", tmp_path, registry.uri)
    with pytest.raises(ConfigError, match="joint version 1 was taught all its tasks at once, by mtl"):
        pull_model("joint@champion", tmp_path, registry.uri)
    monkeypatch.setattr(module, "METHODS", {"hat": module.METHODS["hat"]})
    with pytest.raises(ConfigError, match="was taught by 'teracon'; the methods here are hat"):
        pull_model("tasks@first", tmp_path, registry.uri)


def test_what_is_published_must_be_one_cell_and_have_a_name(registry: Registry) -> None:
    one = config_of(methods="hat")
    check_publishing(one, "tasks", registry.uri)
    check_publishing(one, "another@stable", registry.uri)
    with pytest.raises(ConfigError, match="this command teaches 2 methods and 3 seeds, and a model is one of each"):
        check_publishing(config_of(methods="hat,teracon", seeds="0,1,2"), "tasks", registry.uri)
    with pytest.raises(ConfigError, match="2 orders"):
        check_publishing(config_of(methods="hat", orders=("T1,T2", "T1,T3")), "tasks", registry.uri)
    for target, message in {"a.b": "table name 'a.b'", "": "table name ''", "a@latest": "alias 'latest'"}.items():
        with pytest.raises(RegistryError, match=message):
            check_publishing(one, target, registry.uri)


def test_tables_of_vectors_and_models_are_not_mistaken_for_each_other(registry: Registry, tmp_path: Path) -> None:
    with connect(registry.uri) as client:
        client.create_registered_model("vectors", tags={"userrep.table": "user_embeddings"})
    with pytest.raises(RegistryError, match="holds no continual models; choose another name"):
        check_publishing(config_of(methods="hat"), "vectors", registry.uri)
    with pytest.raises(RegistryError, match="holds no continual models"):
        publish(registry.planned, "vectors", tmp_path, registry.uri)
    with pytest.raises(RegistryError, match="is no embedding table: `userrep publish` did not make it"):
        pull("tasks@first", tmp_path / "table", tracking_uri=registry.uri)
    with pytest.raises(UnknownTableError, match=r"no published continual model 'tsks'; did you mean tasks"):
        pull_model("tsks@first", tmp_path, registry.uri)


def test_a_model_on_a_pretrained_encoder_brings_it_along(registry: Registry, tmp_path: Path) -> None:
    """The encoder is elsewhere, or gone, where the model is continued."""
    here, there = tmp_path / "here", tmp_path / "there"
    write_ingested(here / "data", SERVICES, draw_shards(0))
    write_encoder(here / "encoder")
    few = TaskTraining(batch_size=8, learning_rate=0.01, max_epochs=1)
    config = ContinualJobConfig(
        tasks=ShardTasks(
            path=here / "data",
            questions=(LabelQuestion(label="gender"), ItemQuestion(service="buy", max_targets=2)),
            max_items=6,
            max_users=35,
        ),
        methods=(MethodChoice(name="hat"),),
        orders=(("universal", "gender"),),
        training=ContinualConfig(backbone=PretrainedClue(encoder=EncoderTable(path=here / "encoder")), later=few),
    )
    planned, _ = teach(config, here / "cell")
    publish(planned, "pretrained", here, registry.uri)
    alone, _ = teach(config.model_copy(update={"orders": ()}), here / "alone")
    shutil.copytree(here / "data", there / "data")
    (here / "encoder").rename(here / "gone")
    moved = config.with_overrides([f"tasks.path={there / 'data'}"])
    model = pull_model("pretrained@champion", there, registry.uri)
    going_on = continued(moved.with_settings_of(model.cell), model)
    assert going_on.orders == (("universal", "gender", "buy"),)
    own, taught = teach(going_on, there / "cell", model.directory)
    assert taught == ["buy"]
    assert_same_cells(own.directory, alone.directory)
    assert own.cell.content_hash() == alone.cell.content_hash()
    # Without the question about `buy`, its events are in the histories.
    fewer = moved.tasks.model_copy(update={"questions": (LabelQuestion(label="gender"),)})
    with pytest.raises(ConfigError, match="task universal, or the item histories of its users, are not those"):
        continued(moved.model_copy(update={"tasks": fewer}).with_settings_of(model.cell), model)
    write_encoder(there / "other", seed=1)
    other = config.with_settings_of(model.cell).with_overrides([f"training.backbone.encoder.path={there / 'other'}"])
    with pytest.raises(ConfigError, match="it was trained anew since"):
        continued(other, model)
