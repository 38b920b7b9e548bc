"""The commands of cluster/README.md, run as far as a machine without Kubernetes, Docker and a cloud can."""

import re
import shlex
from pathlib import Path

import pytest
import ray.scripts.scripts
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from tests.support.kubernetes import validate_manifest

ROOT = Path(__file__).parents[2]


def commands(program: str) -> list[list[str]]:
    """Words of the lines of code blocks that begin with a program, without comments."""
    found = []
    for block in re.findall(r"```\n(.*?)```", (ROOT / "cluster/README.md").read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == program:
                found.append(words[1:])
    return found


def arguments_of(words: list[str]) -> list[str]:
    """What the program gets: words up to those of the shell."""
    border = next((place for place, word in enumerate(words) if word in (">", "&&")), len(words))
    return words[:border]


def test_the_commands_of_userrep_cluster_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [words for words in commands("userrep") if words[0] == "cluster"]
    assert [words[1] for words in lines] == ["values", "render", "render"]
    for words in lines:
        arguments, _, target = (words[: words.index(">")], ">", words[-1]) if ">" in words else (words, "", "")
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        if target:
            Path(target).write_text(done.stdout)
    policies = yaml.safe_load_all(Path("rendered/kuberay/raycluster.yaml").read_text())
    assert {document["metadata"]["namespace"] for document in policies} == {"team"}


def test_kubectl_gets_manifests_that_the_api_takes() -> None:
    files = [words[words.index("-f") + 1] for words in commands("kubectl") if "-f" in words]
    assert len(files) >= 6
    for file in files:
        for document in yaml.safe_load_all((ROOT / file).read_text()):
            validate_manifest(document)


def test_kubectl_makes_the_secrets_that_manifests_name_and_finds_the_service() -> None:
    made = {words[words.index("generic") + 1] for words in commands("kubectl") if "generic" in words}
    names = set()
    for path in (ROOT / "cluster").rglob("*.yaml"):
        names |= set(re.findall(r"secret(?:Key)?Ref:\n +name: (\S+)", path.read_text()))
    assert made == names
    (forward,) = [words for words in commands("kubectl") if "port-forward" in words]
    cluster = list(yaml.safe_load_all((ROOT / "cluster/kuberay/raycluster.yaml").read_text()))[-1]
    assert forward[-2] == f"service/{cluster['metadata']['name']}-head-svc"  # KubeRay's name for it


def test_ray_has_its_commands_and_their_files() -> None:
    lines = list(commands("ray"))
    assert {words[0] for words in lines} == {"get-auth-token", "start", "up", "dashboard", "down"}
    for name, *arguments in lines:
        ray.scripts.scripts.cli.commands[name].make_context(name, arguments_of(arguments))
        assert all((ROOT / argument).is_file() for argument in arguments if argument.endswith(".yaml"))


def test_docker_gets_files_and_targets_that_exist() -> None:
    values = (ROOT / "cluster/values.yaml").read_text()
    for words in commands("docker"):
        file = ROOT / words[words.index("--file") + 1]
        assert file.is_file()
        if "--target" in words:
            assert f" AS {words[words.index('--target') + 1]}\n" in file.read_text()
        if "--tag" in words:
            assert words[words.index("--tag") + 1].removesuffix("-ray-up") in values
