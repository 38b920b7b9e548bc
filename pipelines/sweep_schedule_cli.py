"""`userrep sweep schedule`: prints, or writes, what a scheduler needs to run a sweep again and again."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

Target = Literal["cron", "CronJob", "RayCronJob"]


def schedule(
    cron: Annotated[str, typer.Option("--cron", help="Five fields, once a day at most, e.g. '0 3 * * 1'.")],
    workdir: Annotated[Path, typer.Option("--workdir", "-w", help="Runs go to WORKDIR/<date>; latest links to one.")],
    config: Annotated[str, typer.Option("--config", "-c", help="Of the sweep, as `userrep sweep run` takes it.")],
    data: Annotated[str | None, typer.Option("--data", "-d", help="Raw data; {date} in it is the run's.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Override of the sweep's config; {date} as in --data.")
    ] = None,
    target: Annotated[Target, typer.Option("--target", help="A crontab's line, or manifests for KubeRay.")] = "cron",
    name: Annotated[
        str, typer.Option("--name", help="Of the schedule; two in a namespace need two.")
    ] = "userrep-sweep",
    time_zone: Annotated[str, typer.Option("--time-zone", help="IANA name, e.g. Asia/Seoul.")] = "UTC",
    max_hours: Annotated[float, typer.Option("--max-hours", help="No cell is begun that would end later.")] = 24.0,
    flops_per_s: Annotated[
        float | None, typer.Option("--flops-per-s", help="Of a lane; default: what a run's head measures each time.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow server, without credentials. Default: one in WORKDIR.")
    ] = None,
    suspend: Annotated[bool, typer.Option("--suspend", help="Render it, but start nothing.")] = False,
    cluster: Annotated[
        list[str] | None,
        typer.Option(
            "--cluster", help="Of manifests, e.g. image=..., claim=..., worker.gpus=1, secret=.... Repeatable."
        ),
    ] = None,
    env_file: Annotated[
        Path | None, typer.Option("--env-file", help="Of a crontab: file of NAME=value lines with credentials.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write to, instead of printing.")] = None,
) -> None:
    """Render a sweep that comes back with new data: a crontab's line, or a Kubernetes CronJob that creates a RayJob."""
    from pipelines.kubernetes_config import KubernetesConfig
    from pipelines.sweep_kubernetes import render_kubernetes
    from pipelines.sweep_schedule import ScheduleConfig, render_crontab

    is_cron = target == "cron"
    found = ScheduleConfig.parse(
        {
            "name": name,
            "cron": cron,
            "mlflow_uri": tracking_uri,
            "suspend": suspend,
            "sweep": {
                "config": _config_for(config, is_cron),
                "root": str(workdir.absolute()) if is_cron else str(workdir),
                "data": data if data is None or not is_cron else str(Path(data).absolute()),
                "overrides": overrides or [],
                "max_hours": max_hours,
                "flops_per_s": flops_per_s,
                "time_zone": time_zone,
            },
        }
    )
    if is_cron:
        text = render_crontab(found, sys.executable, None if env_file is None else str(env_file.absolute()))
    else:
        text = render_kubernetes(found, KubernetesConfig.parse(_nested(cluster or [])), target)
    _deliver(text, out, f"{name}.crontab" if is_cron else f"{name}.yaml")


def _config_for(config: str, is_cron: bool) -> str:
    # A file is named as seen from here; cron starts elsewhere, and the paths of pods are not known here.
    return str(Path(config).absolute()) if is_cron and Path(config).is_file() else config


def _nested(assignments: list[str]) -> dict[str, Any]:
    """Plain values of `a.b=value` assignments, which the config then checks."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise ValueError(f"--cluster {assignment!r} is not of the form key=value or key.subkey=value")
        *parents, key = path.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"--cluster {assignment!r}: {parent!r} already has a value of its own")
        node[key] = yaml.safe_load(text)
    return values


def _deliver(text: str, out: Path | None, file_name: str) -> None:
    if out is None:
        sys.stdout.write(text)
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / file_name).write_text(text)
    sys.stderr.write(f"{out / file_name}\n")
