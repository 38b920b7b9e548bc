"""`userrep cluster`: renders everything in `cluster/` from one values file."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Render manifests, cluster files, images and the MLflow server.", no_args_is_help=True)

ValuesOption = Annotated[
    Path | None, typer.Option("--values", help="Values file, see `userrep cluster values`. Default: all defaults.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override, e.g. kubernetes.namespace=team. Repeatable.")
]


@app.command()
def render(
    out: Annotated[Path, typer.Option("--out", help="Directory to write to; files of other names stay.")],
    values: ValuesOption = None,
    overrides: SetOption = None,
    only: Annotated[
        Literal["kuberay", "ray-up", "docker", "mlflow"] | None, typer.Option("--only", help="One part.")
    ] = None,
) -> None:
    """Render KubeRay manifests, `ray up` files, images and the MLflow server: the same values, the same bytes."""
    from pipelines import cluster_render

    found = cluster_render.load_values(values, overrides or [])
    # Without the paths, which differ from machine to machine, and would make the same values other bytes.
    words = ["userrep", "cluster", "render", *(["--values", values.name] if values else []), "--out", "DIR"]
    for override in overrides or []:
        words += ["--set", override]
    for path in cluster_render.write(cluster_render.render(found, shlex.join(words), only), out):
        sys.stderr.write(f"{path}\n")


@app.command("values")
def show_values(values: ValuesOption = None, overrides: SetOption = None) -> None:
    """Print a values file with every key explained, ready to be edited and given to --values."""
    from pipelines import cluster_render

    sys.stdout.write(cluster_render.explain(cluster_render.load_values(values, overrides or [])))
