"""`userrep continual`: methods of continual learning, taught the same tasks, side by side.

All cells (method, seed, order) are run one after another by one group of workers, since starting one costs tens of
seconds. Cells that can be compared, of the same tasks, split and training, live in `continual/<hash of these>/`. One
goes on at the task at which it was interrupted; finished ones are not run again, so methods, seeds and orders can be
added later, and the report is over all of them. Every cell is a run in MLflow, below the run of the experiment.
"""

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig

from pipelines.console import Console
from pipelines.continual_config import ContinualJobConfig, default_order
from pipelines.continual_report import outcome_metrics, write_continual_report
from pipelines.continual_worker import CELLS, FAILURE_NAME, teach_cells
from pipelines.mlflow_store import tracking_uri
from pipelines.session import ray_session
from userrep import storage
from userrep.config import ConfigError
from userrep.continual.catalog import METHODS
from userrep.data.tasks import TaskSet
from userrep.evaluation.task_baselines import popularity_score
from userrep.manifest import IncompleteTableError
from userrep.mirror import shown
from userrep.publishing.connection import RegistryError, check_uri
from userrep.training.cells import Cell, CellResult, read_cell
from userrep.training.fence import take_over
from userrep.training.log_pieces import receive_log
from userrep.training.replay import living_job, send_run
from userrep.training.run_record import RECORD_NAME, RunRecord
from userrep.training.tracking import SPOOL_NAME, MetricSpool, SpoolReader

STAGE = CONTINUAL = "continual"  # the stage, and its directory
REPORT = "report"
POLL_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Planned:
    """A cell and its directory."""

    cell: Cell
    directory: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.cell.label} seed {self.cell.seed} {'>'.join(self.cell.order)}"

    def result(self) -> CellResult | None:
        """What there is of it; None before its first lesson."""
        try:
            return read_cell(self.directory)
        except IncompleteTableError:
            return None

    @property
    def is_complete(self) -> bool:
        """Whether it has been taught all its tasks."""
        result = self.result()
        return result is not None and result.is_complete


@dataclass(frozen=True)
class Experiment:
    """What a command has run: its cells, their tasks as those with seed 0 have them, and where the report is."""

    cells: list[Planned]
    tasks: TaskSet
    report: Path


def run(
    config: ContinualJobConfig, workdir: Path, console: Console, uri: str | None = None, lenders: Sequence[Path] = ()
) -> Experiment:
    """Runs the cells that are not finished, then writes the report over all that are.

    Args:
        config: what to run.
        workdir: keeps the cells.
        console: for the user.
        uri: of MLflow; None: that of the working directory or the environment.
        lenders: directories of cells elsewhere, whose lessons need not be taught.

    Raises:
        ConfigError: the config does not fit the data or the cluster.
        RuntimeError: a cell has failed, or the workers have; what was learned stays, and the report is written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri(workdir, uri)
    check_uri(uri, create=True)
    config = config.pinned()
    tasks = config.build_tasks()
    console.say("continual: " + ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in tasks.facts.items() if n))
    directory = experiment_directory(config, tasks, workdir)
    storage.receive(directory, f"{CELLS}/*/task-*")
    cells = plan(config, tasks, directory)
    left = [planned for planned in cells if not planned.is_complete]
    console.say(f"continual: {len(cells)} cells, {len(cells) - len(left)} of them finished before")
    try:
        if left:
            with _recorded(config, left, directory), _following(left, console), ray_session(console.is_verbose):
                _train(config, left, directory, lenders)
    finally:
        finished = [result for planned in _all_cells(directory) if (result := planned.result()) and result.is_complete]
        if finished:
            popularity = {seed: _popularity(config, seed) for seed in {result.cell.seed for result in finished}}
            write_continual_report(finished, popularity, directory / REPORT)
            storage.send(directory, f"{REPORT}/*")
            spool_outcome(directory, outcome_metrics(finished, default_order(tasks)))
        _send(directory, uri, workdir, console)
    failed = [planned for planned in left if not planned.is_complete]
    if failed:
        names = ", ".join(planned.name for planned in failed)
        raise RuntimeError(
            f"continual: {len(failed)} cells have failed ({names}); see {FAILURE_NAME} in {shown(directory / CELLS)}"
        )
    return Experiment(cells, tasks, directory / REPORT)


def _popularity(config: ContinualJobConfig, seed: int) -> dict[str, float]:
    """By task, what the frequencies of its classes score; a user vector has no classes."""
    tasks = config.build_tasks(seed)
    return {task.name: popularity_score(task, tasks.sequences) for task in tasks.tasks if task.kind != "vector"}


def experiment_directory(config: ContinualJobConfig, tasks: TaskSet, workdir: Path) -> Path:
    """Where cells are kept that can be compared with each other: of the same tasks, split and training."""
    return workdir / CONTINUAL / config.identity(tasks)


def plan(config: ContinualJobConfig, tasks: TaskSet, directory: Path) -> list[Planned]:
    """The cells of a config with their directories."""
    return [Planned(cell, directory / CELLS / cell.content_hash()) for cell in config.cells(tasks)]


def _all_cells(directory: Path) -> list[Planned]:
    """Every cell that was begun in an experiment, by this command or an earlier one, in the order of the catalog."""
    found = []
    for path in (directory / CELLS).glob("*"):
        try:
            found.append(Planned(read_cell(path).cell, path))
        except IncompleteTableError:
            continue
    methods = list(METHODS)
    return sorted(found, key=lambda p: (p.cell.order, methods.index(p.cell.method), p.cell.label, p.cell.seed))


@contextmanager
def _recorded(config: ContinualJobConfig, left: list[Planned], directory: Path) -> Iterator[None]:
    """Keeps what MLflow is to be told of the experiment and of every cell that is run in the block."""
    directory.mkdir(parents=True, exist_ok=True)
    training = {"training": config.training.identity(), "split": config.split.model_dump(mode="json")}
    parent = RunRecord.start(directory, config.experiment, training, stage=STAGE, name=config.name)
    with ExitStack() as stack:
        stack.enter_context(living_job(directory))
        for planned in left:
            planned.directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(living_job(planned.directory))
            (planned.directory / FAILURE_NAME).unlink(missing_ok=True)
            more = {"stage": STAGE, "name": planned.name, "parent": parent.key}
            RunRecord.start(planned.directory, config.experiment, planned.cell.identity(), **more)
        try:
            yield
        finally:
            for planned in left:
                if (planned.directory / SPOOL_NAME).exists():
                    _end_record(planned.directory, "FINISHED" if planned.is_complete else "FAILED")
                else:  # not begun, so there is nothing to tell
                    storage.remove(planned.directory / RECORD_NAME)
            _end_record(directory, "FINISHED")


def _end_record(directory: Path, status: str) -> None:
    RunRecord.read(directory).model_copy(update={"status": status}).write(directory)


def _train(config: ContinualJobConfig, left: list[Planned], directory: Path, lenders: Sequence[Path]) -> None:
    workers, job = config.workers, uuid.uuid4().hex
    cluster = ray.cluster_resources()
    if cluster.get("CPU", 0) < workers.num_workers:
        raise ConfigError(
            f"workers.num_workers={workers.num_workers}, and the Ray cluster has {cluster.get('CPU', 0):g} CPU: "
            "use fewer workers"
        )
    if workers.use_gpu and cluster.get("GPU", 0) < workers.num_workers:
        raise ConfigError(
            f"workers.use_gpu=true with {workers.num_workers} workers, and the Ray cluster has "
            f"{cluster.get('GPU', 0):g} GPUs: use fewer workers, or workers.use_gpu=false"
        )
    take_over(directory, job)
    settings = {
        "config": config.model_dump(mode="json"),
        "directory": str(directory),
        "job": job,
        "lenders": [str(lender) for lender in lenders],
        "cells": [{"cell": p.cell.model_dump(mode="json"), "directory": str(p.directory)} for p in left],
    }
    trainer = ray.train.torch.TorchTrainer(
        teach_cells,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers.num_workers, use_gpu=workers.use_gpu),
        run_config=RunConfig(
            name=f"attempt-{job}",  # Ray Train must not restore anything
            **storage.for_ray(directory / "ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=10),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        rank_, cause = next(iter(sorted(error.worker_failures.items())))
        raise RuntimeError(f"continual: worker {rank_} failed: {cause}; the same command goes on") from error
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(f"continual: the workers could not be started: {error}") from error
    finally:
        storage.receive(directory, f"{CELLS}/*/task-*", f"{CELLS}/*/{FAILURE_NAME}")
        for planned in left:
            receive_log(planned.directory / SPOOL_NAME)


@contextmanager
def _following(left: list[Planned], console: Console) -> Iterator[None]:
    """Shows while the block runs what the cells say."""
    stop = threading.Event()

    def follow() -> None:
        readers = {planned.directory: SpoolReader(planned.directory / SPOOL_NAME) for planned in left}
        for reader in readers.values():
            reader.read()
        num_epochs, finished = 0, set()
        with console.progress("continual", "epochs") as advance:
            while not stop.wait(POLL_INTERVAL_S):
                note = ""
                for planned in left:
                    if planned.directory in finished:
                        continue
                    points = readers[planned.directory].read()
                    num_epochs += len(points)
                    if points:
                        shown = ", ".join(f"{name} {value:.3f}" for name, value in points[-1]["metrics"].items())
                        note = f"{planned.cell.label} seed {planned.cell.seed}: {shown}"
                        if any(name.startswith("test/") for name in points[-1]["metrics"]) and planned.is_complete:
                            finished.add(planned.directory)
                if note:
                    advance(len(finished), len(left), num_epochs, note)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def spool_outcome(directory: Path, metrics: dict[str, float]) -> None:
    """Spools what a report says, for the run of the experiment; reports that say something new are its steps.

    Args:
        directory: of the experiment.
        metrics: from `outcome_metrics`; may be none.
    """
    points = SpoolReader(directory / SPOOL_NAME).read()
    last = points[-1] if points else {"step": 0, "metrics": {}}
    if metrics != last["metrics"]:
        with closing(MetricSpool(directory / SPOOL_NAME)) as spool:
            spool.write(last["step"] + 1, time.time_ns() // 1_000_000, metrics)


def _send(directory: Path, uri: str, workdir: Path, console: Console) -> None:
    """Sends the runs of an experiment to MLflow; that it is away is no reason to fail."""
    for run_dir in [directory, *sorted(path.parent for path in (directory / CELLS).glob(f"*/{RECORD_NAME}"))]:
        try:
            send_run(run_dir, uri, waits=True)
        except RegistryError as error:
            console.say(
                f"continual: MLflow does not have all runs ({error}); "
                f"`userrep sync-tracking --workdir {shown(workdir)}` sends the rest"
            )
            return
