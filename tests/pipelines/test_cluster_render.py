"""The command and what it writes: the same bytes each time, no secrets, and images that can be built."""

import ast
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.cluster_config import ClusterValues
from pipelines.cluster_render import explain, load_values, render
from tests.support.rendered import VARIANTS, rendered, values_of
from userrep.config import Config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CODE = sorted((ROOT / "pipelines").glob("cluster_*.py"))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["cluster", *arguments])


def test_the_committed_files_are_what_the_values_give(tmp_path: Path) -> None:
    done = run("render", "--values", str(CLUSTER / "values.yaml"), "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parts = {path.parts[0] for path in written}
    committed = {
        path.relative_to(CLUSTER): path.read_bytes()
        for part in parts
        for path in (CLUSTER / part).rglob("*")
        if path.is_file()
    }
    assert parts == {"kuberay", "ray-up", "docker", "mlflow"}
    assert written == committed


def test_the_committed_values_are_the_explained_defaults() -> None:
    assert run("values").stdout == (CLUSTER / "values.yaml").read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_values_can_be_printed_edited_and_read_again(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(explain(values_of(name)))
    assert load_values(file, []) == values_of(name)
    assert render(load_values(file, []), "x") == render(values_of(name), "x")


def configs(node: Config) -> list[Config]:
    children = [getattr(node, name) for name in type(node).model_fields]
    return [node, *(found for child in children if isinstance(child, Config) for found in configs(child))]


def test_every_key_is_explained() -> None:
    text = explain(ClusterValues())
    for node in configs(ClusterValues()):
        for name, field in type(node).model_fields.items():
            assert field.description, f"{type(node).__name__}.{name}"
            assert field.description.split()[0] in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_one_part_is_the_same_as_among_all(tmp_path: Path) -> None:
    assert run("render", "--out", str(tmp_path), "--only", "ray-up", "--set", "name=team").exit_code == 0
    assert {path.name for path in tmp_path.rglob("*.yaml")} == {"aws.yaml", "gcp.yaml", "local.yaml"}
    text = (tmp_path / "ray-up/aws.yaml").read_text()
    assert text.startswith("# Rendered by `userrep cluster render --out DIR --set name=team`: edit the values.\n")
    assert yaml.safe_load(text)["cluster_name"] == "team-aws"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_file_says_how_it_was_made_and_has_lines_that_can_be_read(name: str) -> None:
    for file, text in rendered(name).items():
        assert text.startswith("# Rendered by `userrep cluster render --out DIR`"), file
        assert text.isascii()
        assert text.endswith("\n")
        assert not re.search(r"[ \t]$", text, flags=re.MULTILINE), file
        comments = [line for line in text.splitlines() if line.strip().startswith("#")]
        assert max(map(len, comments)) <= 120, file


SECRETS = [
    {"mlflow_uri": "http://me:hunter2@mlflow:5000"},
    {"mlflow_uri": "http://mlflow:5000?token=hunter2"},
    {"image": "registry.example/hunter2@x:1", "mlflow_uri": "https://hunter2@mlflow"},
    {"jobs": {"pretrain": {"overrides": ["source.password=hunter2"]}}},
    {"jobs": {"pretrain": {"data": "s3://AKIAABCDEFGHIJKLMNOP:hunter2@bucket/x"}}},
    {"jobs": {"pretrain": {"options": ["--api-key=hunter2"]}}},
    {"jobs": {"embed": {"options": ["AKIAABCDEFGHIJKLMNOP"]}}},
    {"kubernetes": {"mlflow_secret": "MLFLOW_TRACKING_TOKEN=hunter2"}},
    {"kubernetes": {"kubectl_image": "https://me:hunter2@registry/kubectl"}},
    {"mlflow": {"s3_endpoint": "https://me:hunter2@minio"}},
    {"mlflow": {"artifacts": "s3://me:hunter2@bucket"}},
    {"token": "hunter2"},
    {"ray_up": {"token": "hunter2"}},
]


@pytest.mark.parametrize("values", SECRETS)
def test_a_secret_in_the_values_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    done = run("render", "--values", str(file), "--out", str(tmp_path / "out"))
    assert isinstance(done.exception, ValueError)
    assert not (tmp_path / "out").exists()


def test_what_looks_like_a_secret_is_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"looks like a secret \(password\.\.\.\)") as caught:
        ClusterValues.parse({"jobs": {"pretrain": {"overrides": ["source.password=hunter2"]}}})
    assert "hunter2" not in str(caught.value)


def test_no_environment_reaches_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tokens come from the environment or a file, and neither is read."""
    names = ["RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD"]
    for name in names:
        monkeypatch.setenv(name, "http://me:hunter2@x")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("hunter2")
    for name in VARIANTS:
        assert not [file for file, text in render(values_of(name), "x").items() if "hunter2" in text]
    for path in CODE:
        called = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not called & {"environ", "getenv"}, path


def environments(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for item in value for found in environments(item)]
    if not isinstance(value, dict):
        return []
    own = [entry for entry in value.get("env", []) if isinstance(entry, dict)]
    return own + [found for item in value.values() for found in environments(item)]


@pytest.mark.parametrize("name", VARIANTS)
def test_variables_that_are_secret_refer_to_secrets(name: str) -> None:
    secret = re.compile("PASSWORD|SECRET|TOKEN|ACCESS_KEY")
    for file, text in rendered(name).items():
        if not file.endswith(".yaml"):
            continue
        for document in yaml.safe_load_all(text):
            assert document.get("kind") != "Secret", file
            for entry in environments(document):
                assert not secret.search(entry["name"]) or "secretKeyRef" in entry["valueFrom"], file


@pytest.mark.parametrize("part", ["docker", "mlflow"])
def test_images_are_pinned_and_not_of_root(part: str) -> None:
    text = rendered("default")[f"{part}/Dockerfile"]
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w.-]+==", line)
    )
    instructions = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    users = [line.split()[1] for line in instructions if line.startswith("USER ")]
    assert users[-1] == "1000:1000"
    assert not re.search(r":latest|curl .*\| *sh|sudo|ADD http", text)
    for line in instructions:
        if line.startswith("FROM "):
            assert re.match(r"FROM (python:3\.11\.\d+-slim-bookworm|cluster)( AS [\w-]+)?$", line)
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1])
        for command in [command for command in line.split("&&") if "pip install" in command]:
            assert "--constraint" in command
            for word in shlex.split(command.split("constraints.txt")[1]):
                package = re.split(r"[\[=]", word)[0]
                assert "==" in word or word.startswith(".") or package in pinned, word
                if "==" in word and package in pinned:
                    assert word.split("==")[1] == pinned[package]


def test_the_image_has_the_extra_that_nodes_need_and_only_sources() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "train" in project["project"]["optional-dependencies"]
    files = rendered("default", "docker")
    assert '".[train]"' in files["docker/Dockerfile"]
    listed = files["docker/Dockerfile.dockerignore"].splitlines()
    assert "*" in listed  # all is ignored but what is named
    copied = re.findall(r"^COPY (.*) \S+$", files["docker/Dockerfile"], flags=re.MULTILINE)
    assert {line[1:] for line in listed if line.startswith("!")} == {name for line in copied for name in line.split()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("", "holds no keys"),
        ("- a", "holds no keys"),
        ("kubernets: {}", "kubernets: Extra inputs are not permitted"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_values(file, [])
