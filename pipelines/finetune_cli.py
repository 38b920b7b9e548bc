"""Command `userrep finetune`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.options import DataOption, VerboseOption, local_path

if TYPE_CHECKING:
    from userrep.training.finetune import FinetuneConfig

PREFIX = "finetune."  # of assignments that are not the job's


def finetune(
    source: Annotated[
        Path, typer.Option("--from", help="Table of a pretrained Recformer: the `encoder` directory of its job.")
    ],
    config: Annotated[str, typer.Option("--config", "-c", help="A named config or a YAML/JSON file.")] = "parquet",
    workdir: Annotated[
        Path, typer.Option("--workdir", "-w", parser=local_path, help="Of the target data, tokenized.")
    ] = Path("jobs"),
    data: DataOption = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Train nothing, evaluate what was pretrained.")
    ] = False,
    share: Annotated[float | None, typer.Option("--share", help="Of the training users, e.g. 0.05.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Comma-separated, e.g. 0,1,2.")] = "0",
    table: Annotated[str, typer.Option("--table", help="Name of the table that is written.")] = "finetuned",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Override, e.g. finetune.frozen=null or workers.threads=2. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the inputs, show the config, then stop.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Fine-tune a pretrained Recformer for the next items of the users in --workdir, and rank them among all items."""
    from pipelines import finetune as stage
    from pipelines.console import Console
    from pipelines.experiments.catalog import load_config
    from pipelines.job import Job

    own, others = _split(overrides or [])
    job = Job(load_config(config, data, others), workdir.resolve(), Console(verbose))
    resolved, numbers = _resolve(own, share, is_zero_shot=zero_shot), _parse_seeds(seeds)
    if dry_run:
        stage.check_inputs(job, source.resolve())
        _print({"finetune": resolved.model_dump(mode="json"), "seeds": numbers})
        job.console.say(f"finetune: {job.plan({'finetune': table})['finetune']}")
        return
    facts = stage.run(job, source, resolved, numbers, table)
    _print({held: facts[held] for held in ("validation", "test")})


def _split(assignments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of `finetune.`, without that word, and those of the job."""
    own = [text.removeprefix(PREFIX) for text in assignments if text.startswith(PREFIX)]
    return own, [text for text in assignments if not text.startswith(PREFIX)]


def _resolve(assignments: Sequence[str], share: float | None, *, is_zero_shot: bool) -> "FinetuneConfig":
    """The config that options of the command line describe.

    Raises:
        ConfigError: an assignment or a share that cannot be.
    """
    from userrep.training.finetune import FinetuneConfig

    words = [*assignments, *([] if share is None else [f"share={share}"])]
    return FinetuneConfig().with_overrides(words + (["moving=null", "frozen=null"] if is_zero_shot else []))


def _parse_seeds(text: str) -> list[int]:
    """Seeds of comma-separated numbers.

    Raises:
        ConfigError: one is no whole number >= 0.
    """
    from userrep.config import ConfigError

    seeds = [part.strip() for part in text.split(",")]
    if not all(seed.isdecimal() for seed in seeds):
        raise ConfigError(f"--seeds {text!r} is no list of whole numbers: give e.g. 0,1,2")
    return [int(seed) for seed in seeds]


def _print(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
