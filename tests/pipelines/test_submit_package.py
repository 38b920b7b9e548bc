"""What is sent: sources alone, a known number of bytes, the same digest for the same files."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.submit_package import MAX_BYTES, find_package, write_package
from userrep.config import ConfigError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("userrep/data/a.py", "userrep/__init__.py", "pipelines/cli.py", "pipelines/report.html.j2"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in (
        *(".env", ".git/config", ".venv/lib/x.py", "jobs/encoder/model.safetensors", "data/events.parquet", "setup.py"),
        *("userrep/.env", "pipelines/records/runs.parquet", "userrep/model.safetensors", "pipelines/mlflow.db"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not to be sent")
    return root


def test_data_checkpoints_and_secrets_stay_here(tree: Path, tmp_path: Path) -> None:
    package = find_package(tree)
    names = ["pipelines/cli.py", "pipelines/report.html.j2", "userrep/__init__.py", "userrep/data/a.py"]
    assert [path.as_posix() for path in package.files] == names
    assert package.num_bytes == sum(map(len, names))
    target = tmp_path / "target"
    target.mkdir()
    write_package(package, target, {"submitted_config.yaml": b"name: x"})
    assert (target / "submitted_config.yaml").read_bytes() == b"name: x"
    assert not any("not to be sent" in path.read_text() for path in target.rglob("*") if path.is_file())


def test_the_digest_is_of_names_and_contents(tree: Path) -> None:
    before = find_package(tree).digest
    (tree / "data" / "events.parquet").write_text("other")
    assert find_package(tree).digest == before
    (tree / "userrep/data/a.py").rename(tree / "userrep/data/b.py")
    renamed = find_package(tree).digest
    (tree / "userrep/data/b.py").write_text("changed")
    assert len({before, renamed, find_package(tree).digest}) == 3


def test_too_many_bytes_are_refused_with_the_largest_files(tree: Path) -> None:
    (tree / "userrep" / "vectors.py").write_text("x" * 3_000_000)
    with pytest.raises(
        ConfigError, match=r"have 2\.9 MiB, allowed are 1\.0; the largest: userrep/vectors\.py \(2\.9 MiB\)"
    ):
        find_package(tree, max_bytes=1 << 20)


def test_a_link_out_of_the_tree_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (tree / "userrep" / "key.py").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"key\.py is a link out of the source tree"):
        find_package(tree)


def test_a_directory_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not hold the sources"):
        find_package(tmp_path)


def test_the_code_of_this_command_runs_from_its_copy(tmp_path: Path) -> None:
    package = find_package()
    assert package.num_bytes < MAX_BYTES / 4
    write_package(package, tmp_path, {})
    program = (
        "import importlib.metadata, pipelines; "
        "print(pipelines.__file__, importlib.metadata.distribution('userrep').locate_file('').resolve())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    code, version_of = done.stdout.split()
    assert code == str(tmp_path / "pipelines" / "__init__.py")
    assert Path(version_of) == tmp_path
