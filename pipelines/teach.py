"""Stage `teach`: `encoder/` and `ingest/` -> `taught/`, the encoder after the tasks of the config, by one method.

The tasks are one cell of `userrep continual` on the CLUE backbone, which goes on at the task at which it was
interrupted. A job without tasks has no such stage, and what was pretrained is what is embedded.
"""

import json
import shutil
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from pipelines import continual, ingest, pretrain
from pipelines.continual_config import ContinualJobConfig, ContinualWorkers, ShardTasks
from pipelines.job import Draft, Job
from userrep.data.tasks import TaskSet, TaskSplit
from userrep.data.tokenizer import TOKENIZER_NAME
from userrep.evaluation.task_baselines import popularity_score
from userrep.evaluation.transfer import backward_transfer
from userrep.training.backbones import EncoderTable, PretrainedClue
from userrep.training.cells import METHOD_FILE, CellResult, ContinualConfig, choose_tasks, lesson_directory
from userrep.training.checkpoint import MODEL_FILE, load_encoder

TABLE = "taught"
CLASSES_NAME = "classes.json"  # of every head, by task: what each logit is of
USER_ENCODER = "network.backbone.user_encoder."  # in the state of a method


def encoder_table(job: Job) -> str:
    """The table of the encoder that is embedded: `taught` where there are tasks."""
    return TABLE if job.config.teach.questions else pretrain.TABLE


def task_facts(job: Job) -> dict[str, Any]:
    """What the summary and the table say of the tasks; empty where there are none.

    Returns:
        `order`, `kinds`, `metrics`, `matrix` (R, None above the diagonal), `backward_transfer` (percent) and
        `popularity` (what the frequencies of classes score): all by place in the order.
    """
    if not job.config.teach.questions:
        return {}
    facts = job.manifest(TABLE).facts
    columns = {"order": "name", "kinds": "kind", "metrics": "metric"}
    return {key: [task[name] for task in facts["tasks"]] for key, name in columns.items()} | {
        key: facts[key] for key in ("matrix", "backward_transfer", "popularity")
    }


def run(job: Job) -> None:
    """Runs the stage."""
    config = job.config.teach
    model = job.manifest(pretrain.TABLE).config["model"]

    def write(draft: Draft) -> None:
        experiment = continual.run(_experiment(job), job.workdir, job.console)
        result = experiment.cells[0].result()
        assert result is not None, "a cell that has failed is an error of its own"
        last = lesson_directory(experiment.cells[0].directory, len(result.cell.order) - 1)
        _export(job, draft, load_file(last / METHOD_FILE))
        _commit(job, draft, result, experiment.tasks)

    resolved = {"teach": config.model_dump(mode="json"), "model": model}
    job.run_stage("teach", TABLE, resolved, (ingest.TABLE, pretrain.TABLE), write)


def check_tasks(job: Job) -> None:
    """Builds the tasks, and throws them away: what is wrong with them is to be known before pretraining.

    Raises:
        ConfigError: a service or a label that there is not.
        ValueError: a task without samples in a split.
    """
    if job.config.teach.questions:
        _tasks(job).build(TaskSplit())


def _tasks(job: Job) -> ShardTasks:
    config = job.config.teach
    return ShardTasks(
        path=job.path(ingest.TABLE),
        questions=config.questions,
        max_items=config.max_items,
        max_users=config.max_users,
    )


def _experiment(job: Job) -> ContinualJobConfig:
    config = job.config.teach
    encoder = EncoderTable(path=job.path(pretrain.TABLE))
    workers = job.config.workers
    return ContinualJobConfig(
        name=f"{job.config.name}: tasks",
        tasks=_tasks(job),
        methods=(config.method,),
        seeds=(config.seed,),
        training=ContinualConfig(backbone=PretrainedClue(encoder=encoder), later=config.training),
        # One worker: a batch of tasks is small, and what TERACON rehearses would depend on their number.
        workers=ContinualWorkers(threads=workers.threads, use_gpu=workers.use_gpu),
        experiment=job.config.publish.experiment,
    )


def _export(job: Job, draft: Draft, state: dict[str, Any]) -> None:
    """Writes the whole encoder with what was taught, and the method with its heads and masks."""
    encoder = load_encoder(job.path(pretrain.TABLE))
    encoder.user_encoder.load_state_dict(
        {name.removeprefix(USER_ENCODER): value for name, value in state.items() if name.startswith(USER_ENCODER)}
    )
    save_file(encoder.state_dict(), draft.directory / MODEL_FILE)
    save_file(state, draft.directory / METHOD_FILE)
    shutil.copyfile(job.path(pretrain.TABLE) / TOKENIZER_NAME, draft.directory / TOKENIZER_NAME)


def _commit(job: Job, draft: Draft, result: CellResult, tasks: TaskSet) -> None:
    facts, scores_MM = job.manifest(pretrain.TABLE).facts, result.scores_MM
    taught = choose_tasks(result.cell, tasks)
    classes = {task.name: task.classes for task in taught[1:]}
    (draft.directory / CLASSES_NAME).write_text(json.dumps(classes, indent=1), encoding="utf-8")
    draft.commit(
        "taught",
        {
            "rows": len(tasks.sequences.items),
            "tasks": [
                {"name": t.name, "kind": t.kind, "num_classes": t.num_classes, "metric": t.metric} for t in taught
            ],
            # Of what the first task is, a vector, there are no classes.
            "popularity": [None, *(popularity_score(task, tasks.sequences) for task in taught[1:])],
            "matrix": _plain(scores_MM),
            "backward_transfer": _plain(backward_transfer(scores_MM)),
            **{name: facts[name] for name in ("vocab_size", "tokenizer_digest")},
        },
    )
    scores = (f"{task.name} {task.metric} {score:.4f}" for task, score in zip(taught, scores_MM[-1], strict=True))
    job.console.say(f"teach: {', '.join(scores)}")


def _plain(values: np.ndarray) -> list[Any]:
    """Nested lists, None for NaN: JSON has none."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()
