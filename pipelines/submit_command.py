"""A command line that is to run on a cluster: checked here, before anything is sent, and told apart by its meaning."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
import yaml

from pipelines.experiments.catalog import load_config, load_continual_config, load_sweep_config
from pipelines.finetune_cli import PREFIX
from userrep.config import Config, ConfigError, digest_json

STAGES = (
    *("run", "ingest", "tokenize", "pretrain", "teach", "evaluate", "embed", "publish"),
    *("finetune", "sweep run", "continual"),
)
SENT_CONFIG = "submitted_config"  # name of a config file in the job's working directory, before its suffix
CREDENTIALS = re.compile(r"://[^/@\s]+@")
ABSOLUTE = re.compile(r"/|[a-z][a-z0-9+.-]*:/")  # a path, or a URI, also one that pathlib has shortened to s3:/


@dataclass(frozen=True)
class StageCommand:
    """A command of a job.

    Attributes:
        stage: e.g. `run` or `sweep run`.
        words: what follows `userrep`, as the job says it.
        workdir: of the job.
        digest: of what the command means: resolved config and other options.
        sent: files that the job needs beside the code, by name.
    """

    stage: str
    words: tuple[str, ...]
    workdir: str
    digest: str
    sent: dict[str, bytes]


def parse_command(words: Sequence[str]) -> StageCommand:
    """Parses what follows `userrep submit`, by the command that it names.

    Raises:
        ConfigError: no command of a job, a config that is wrong, a path that the cluster could not know, credentials.
        typer.BadParameter: or another usage error: the command does not take these options.
    """
    depth = 2 if list(words[:1]) == ["sweep"] else 1
    stage, options = " ".join(words[:depth]), list(words[depth:])
    if stage not in STAGES:
        raise ConfigError(f"{stage!r} is no command of a job: give one of {', '.join(STAGES)}")
    _check_words(options)
    values = _parse_options(stage, options)
    for name, value in values.items():
        is_path = isinstance(value, Path) or name in ("workdir", "data")
        if is_path and value is not None and not ABSOLUTE.match(str(value)):
            raise ConfigError(
                f"{name} is {str(value)!r}, and the job runs elsewhere: give an absolute path on storage that all "
                "nodes of the cluster share, or a URI"
            )
    config, overrides = values["config"], values["overrides"] or []
    sent: dict[str, bytes] = {}
    if (file := Path(config)).is_file():
        name = f"{SENT_CONFIG}{file.suffix}"
        sent = {name: file.read_bytes()}
        options = _replace_config(options, name)
    others = {
        name: str(value)
        for name, value in values.items()
        if name not in ("config", "overrides", "verbose") and value is not None
    }
    own = [text for text in overrides if text.startswith(PREFIX)] if stage == "finetune" else []
    resolved = _resolve(stage, config, [text for text in overrides if text not in own])
    _check_paths([text.partition("=")[2] for text in overrides] + [content.decode() for content in sent.values()])
    meaning = {"stage": stage, "config": resolved.model_dump(mode="json"), "options": others, "own": own}
    return StageCommand(stage, (*stage.split(), *options), str(values["workdir"]), digest_json(meaning), sent)


def _parse_options(stage: str, options: list[str]) -> dict[str, Any]:
    from pipelines.cli import app  # which imports the module of `userrep submit`

    command: Any = typer.main.get_command(app)
    for part in stage.split():
        command = command.commands[part]
    return command.make_context(f"userrep {stage}", list(options)).params


def _resolve(stage: str, config: str, overrides: list[str]) -> Config:
    # Without --data, which need not exist here.
    if stage == "continual":
        return load_continual_config(config, None, overrides, "", [], "")
    return load_sweep_config(config, None, overrides) if stage == "sweep run" else load_config(config, None, overrides)


def _check_words(words: Sequence[str]) -> None:
    if any(CREDENTIALS.search(word) for word in words):  # not shown
        raise ConfigError(
            "the command has a URI with credentials in it, and the cluster shows commands: take them out, and name "
            "variables with --env, e.g. --env MLFLOW_TRACKING_USERNAME --env MLFLOW_TRACKING_PASSWORD"
        )


def _check_paths(texts: Sequence[str]) -> None:
    """Refuses relative paths that exist here: from the job's working directory they would lead nowhere."""
    for text in texts:
        for value in _strings(yaml.safe_load(text)):
            if CREDENTIALS.search(value):
                raise ConfigError("the config has a URI with credentials in it, and it is sent to the cluster")
            if "/" in value and not ABSOLUTE.match(value) and Path(value).exists():
                raise ConfigError(
                    f"the config names {value!r} relative to this directory, and the job runs elsewhere: give an "
                    "absolute path on storage that all nodes of the cluster share"
                )


def _strings(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [text for value in node.values() for text in _strings(value)]
    if isinstance(node, list):
        return [text for value in node for text in _strings(value)]
    return [node] if isinstance(node, str) else []


def _replace_config(words: list[str], name: str) -> list[str]:
    kept, is_value = [], False
    for word in words:
        if is_value:
            is_value = False
        elif word in ("--config", "-c"):
            is_value = True
        elif not word.startswith(("--config=", "-c")):
            kept.append(word)
    return ["--config", name, *kept]
