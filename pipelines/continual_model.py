"""Finished models of continual learning in the registry: published by `--publish`, gone on with by `--continue-from`.

A pulled model lies in `continual/models/NAME-vN` and lends its lessons to the cells of the command, so that only what
its order does not have yet is taught. What would make these lessons others is refused before any worker starts.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.continual import CONTINUAL, Planned
from pipelines.continual_config import ContinualJobConfig, default_order
from pipelines.continual_groups import arrows
from userrep.config import ConfigError
from userrep.continual.catalog import METHODS
from userrep.data.task_digests import digest_prefixes
from userrep.data.tasks import TaskSet
from userrep.manifest import read_manifest
from userrep.publishing.client import pull_version, resolve
from userrep.publishing.connection import connect
from userrep.publishing.registry import Published, check_free, publish
from userrep.training.cell_table import CELLS, ENCODER, write_cell_table
from userrep.training.cells import Cell, choose_tasks, lesson_directory
from userrep.training.replay import find_run, flatten
from userrep.training.run_record import RECORD_NAME, RunRecord

MODELS = "models"  # in the directory `continual`, beside the experiments
ALIAS = "champion"  # where none is named


@dataclass(frozen=True)
class Model:
    """A pulled model.

    Attributes:
        name: for people: name and version.
        directory: of its table, which lends its lessons.
        cell: that it is, with the path of its own copy of the encoder, if it has one.
        data_digests: of its tasks, as `digest_prefixes` gives them.
    """

    name: str
    directory: Path
    cell: Cell
    data_digests: tuple[str, ...]


def pull_model(reference: str, workdir: Path, uri: str, *, verbose: bool = False) -> Model:
    """Downloads a model, verifies it, and moves it into the working directory in one step; once per version.

    Args:
        reference: `name@alias`, `name@v12` or `name/12`.
        workdir: of the command.
        uri: of the MLflow that has it.
        verbose: let MLflow log.

    Raises:
        RegistryError: there is no such model, or no answer.
        IncompleteTableError: what was downloaded is not what was published.
        ConfigError: it cannot be gone on with: its method is unknown here, or teaches all tasks at once.
    """
    version = resolve(reference, tracking_uri=uri, kind=CELLS, verbose=verbose)
    directory = workdir / CONTINUAL / MODELS / f"{version.name}-v{version.version}"
    manifest = pull_version(version, directory, tracking_uri=uri, kind=CELLS, verbose=verbose).manifest
    cell, name = Cell.parse(manifest.config), f"{version.name} version {version.version}"
    if cell.method not in METHODS:
        raise ConfigError(f"{name} was taught by {cell.method!r}; the methods here are {', '.join(METHODS)}")
    if METHODS[cell.method].method.is_joint:
        raise ConfigError(
            f"{name} was taught all its tasks at once, by {cell.method}: a task cannot be added. Teach "
            f"{arrows(cell.order)} and the new tasks anew, or continue a model of another method"
        )
    encoder = cell.training.backbone.encoder
    if encoder is not None:
        own = encoder.model_copy(update={"path": directory / ENCODER})
        backbone = cell.training.backbone.model_copy(update={"encoder": own})
        cell = cell.model_copy(update={"training": cell.training.model_copy(update={"backbone": backbone})})
    manifests = [read_manifest(lesson_directory(directory, number)) for number in range(len(cell.order))]
    return Model(name, directory, cell, tuple(lesson.inputs["tasks"] for lesson in manifests))


def continued(config: ContinualJobConfig, model: Model) -> ContinualJobConfig:
    """A config whose cells go on where the model ends, once nothing speaks against it.

    Args:
        config: of the command; without an order, the model's is followed by all tasks that it does not have.
        model: to go on from.

    Raises:
        ConfigError: other settings than the model's, other data of its tasks, or an order that does not go on from
            its own.
    """
    config = config.pinned()
    _check_settings(config, model)
    orders = config.orders
    tasks = config.model_copy(update={"orders": orders or (model.cell.order,)}).build_tasks(model.cell.seed)
    _check_data(tasks, model)
    if not orders:
        new = [name for name in default_order(tasks) if name not in model.cell.order]
        if not new:
            raise ConfigError(f"{model.name} was taught all tasks of this data set ({arrows(model.cell.order)})")
        orders = ((*model.cell.order, *new),)
    num_tasks = len(model.cell.order)
    for order in orders:
        if order[:num_tasks] != model.cell.order or len(order) == num_tasks:
            raise ConfigError(
                f"order {arrows(order)} does not go on from {model.name}, which was taught {arrows(model.cell.order)}: "
                "begin with these tasks and name at least one more, or leave --order out"
            )
    return config.model_copy(update={"orders": orders})


def _check_settings(config: ContinualJobConfig, model: Model) -> None:
    """A lesson is a function of method, options, seed and training, so these must be the model's."""
    known = dict(flatten(model.cell.identity()))
    for method in config.methods:
        for seed in config.seeds:
            values = {"method": method.name, "options": method.options, "seed": seed, "training": config.training}
            given = dict(flatten(Cell.parse({**values, "order": model.cell.order}).identity()))
            for key in sorted(known.keys() | given.keys()):
                if given.get(key) != known.get(key):
                    raise ConfigError(
                        f"{key} is {given.get(key)!r}, and {known.get(key)!r} of {model.name}: leave it out, and it is "
                        "taken from the model; with another one, teach from the first task on"
                    )


def _check_data(tasks: TaskSet, model: Model) -> None:
    names = [task.name for task in tasks.tasks]
    if missing := [name for name in model.cell.order if name not in names]:
        raise ConfigError(
            f"{model.name} was taught {', '.join(missing)}, and this data set has the tasks {', '.join(names)}: past "
            "tasks are measured, and rehearsed, with their own data"
        )
    chosen, with_texts = choose_tasks(model.cell, tasks), model.cell.training.reads_texts
    own_digests = digest_prefixes(tasks, chosen, with_texts)
    for number, (own, taught) in enumerate(zip(own_digests, model.data_digests, strict=True)):
        if own != taught:
            what = f"task {chosen[number].name}{'' if number else ', or the item histories of its users,'}"
            raise ConfigError(
                f"the data of {what} are not those that {model.name} was taught (digest {own}, then {taught}): use the "
                "same users, items, splits and past tasks, see `tasks` and `split` of the config. A new task may only "
                "add questions about the same histories"
            )


def check_publishing(config: ContinualJobConfig, target: str, uri: str, *, verbose: bool = False) -> None:
    """Checks, before anything is taught, that `publish_model` will know what to publish, and may.

    Args:
        config: of the command.
        target: `NAME` or `NAME@ALIAS`.
        uri: of the MLflow to publish to.
        verbose: let MLflow log.

    Raises:
        ConfigError: it stands for several cells.
        RegistryError: a name that cannot be or that holds something else, or no answer.
    """
    counts = {"methods": len(config.methods), "seeds": len(config.seeds), "orders": max(1, len(config.orders))}
    if several := [f"{number} {what}" for what, number in counts.items() if number > 1]:
        raise ConfigError(
            f"--publish {target}: this command teaches {' and '.join(several)}, and a model is one of each: choose "
            "one with --methods, --seeds and --order"
        )
    check_free(*_target(target), tracking_uri=uri, kind=CELLS, verbose=verbose)


def publish_model(
    planned: Planned, target: str, experiment: str, workdir: Path, uri: str, *, verbose: bool = False
) -> Published:
    """Makes a finished cell a version of a registered model, then points the alias to it.

    Args:
        planned: the cell.
        target: `NAME` or `NAME@ALIAS`.
        experiment: in MLflow, where the cell's run is.
        workdir: of the command.
        uri: of the MLflow to publish to.
        verbose: let MLflow log.

    Raises:
        IncompleteTableError: the cell is not finished, or damaged.
        RegistryError: the registry could not be reached or refused; the alias is where it was.
    """
    name, alias = _target(target)
    with TemporaryDirectory(prefix=".publish-", dir=workdir / CONTINUAL) as folder:
        manifest = write_cell_table(planned.directory, planned.cell, Path(folder) / CELLS.name)
        return publish(
            Path(folder) / CELLS.name,
            name,
            alias,
            tracking_uri=uri,
            experiment=experiment,
            run_id=_run_id(planned.directory, experiment, uri),
            metrics={f"final/{key}": score for key, score in manifest.facts["scores"].items()},
            kind=CELLS,
            verbose=verbose,
        )


def _run_id(directory: Path, experiment: str, uri: str) -> str | None:
    """The cell's run in MLflow; None where MLflow does not have it, and then publishing is a run of its own."""
    if not (directory / RECORD_NAME).is_file():
        return None
    with connect(uri, create=True) as client:
        return find_run(client, experiment, RunRecord.read(directory).key)


def _target(text: str) -> tuple[str, str]:
    name, _, alias = text.partition("@")
    return name, alias or ALIAS
