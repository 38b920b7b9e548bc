"""From one values file to everything in `cluster/`: the same values give the same bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic.fields import FieldInfo

from pipelines.cluster_config import ClusterValues
from pipelines.cluster_docker import render_docker
from pipelines.cluster_kuberay import render_kuberay
from pipelines.cluster_mlflow import render_mlflow
from pipelines.cluster_ray_up import render_ray_up
from userrep.config import Config, ConfigError

Part = Literal["kuberay", "ray-up", "docker", "mlflow"]
RENDERERS: dict[Part, Callable[[ClusterValues], dict[str, str]]] = {
    "kuberay": render_kuberay,
    "ray-up": render_ray_up,
    "docker": render_docker,
    "mlflow": render_mlflow,
}
VALUES_HEADER = "# Values of `userrep cluster render`. They name secrets, and never hold one.\n"
WIDTH = 118


def load_values(file: Path | None, overrides: Sequence[str]) -> ClusterValues:
    """Values of a file, what it leaves out by default, then overrides.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds what values cannot be.
    """
    if file is None:
        return ClusterValues().with_overrides(overrides)
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"--values {file} cannot be read: {error.strerror}; see `userrep cluster values`") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--values {file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--values {file} holds no keys; see `userrep cluster values`")
    return ClusterValues.parse(values).with_overrides(overrides)


def render(values: ClusterValues, command: str, only: Part | None = None) -> dict[str, str]:
    """All files by their path below the output directory.

    Args:
        values: what to render.
        command: which renders it, for the first line of every file.
        only: one part; None: all.

    Raises:
        ConfigError: what no cluster could run.
    """
    found = {}
    for part, renderer in RENDERERS.items():
        if only in (None, part):
            for name, text in renderer(values).items():
                found[f"{part}/{name}"] = f"# Rendered by `{command}`: edit the values.\n{text}"
    return found


def write(files: dict[str, str], out: Path) -> list[Path]:
    """Writes files below a directory, and returns their paths. Others there stay as they are."""
    paths = []
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        paths.append(path)
    return paths


def explain(values: ClusterValues) -> str:
    """A values file with a comment above every key; a key that returns in another place is explained once."""
    return VALUES_HEADER + "\n".join(_lines(values, 0, set())) + "\n"


def _lines(node: Config, depth: int, explained: set[tuple[str, str]]) -> list[str]:
    lines: list[str] = []
    for name, field in type(node).model_fields.items():
        lines += [] if depth else [""]
        value = getattr(node, name)
        if (name, field.description or "") not in explained:
            explained.add((name, field.description or ""))
            lines += _comment(field, depth)
        if isinstance(value, Config):
            lines += [f"{'  ' * depth}{name}:", *_lines(value, depth + 1, explained)]
        else:
            lines += _plain(name, value, depth)
    return lines


def _comment(field: FieldInfo, depth: int) -> list[str]:
    import textwrap

    indent = "  " * depth
    return textwrap.wrap(
        field.description or "",
        WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_on_hyphens=False,
    )


def _plain(name: str, value: Any, depth: int) -> list[str]:
    # Collections of collections a line each; a document of one scalar would end with "...".
    is_short = not isinstance(value, dict | tuple) or not value
    text = yaml.safe_dump({name: _json(value)}, sort_keys=False, default_flow_style=False if is_short else None)
    return [f"{'  ' * depth}{line}" for line in text.splitlines()]


def _json(value: Any) -> Any:
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, tuple | list) else value
