"""The code that a job runs: that of this command, which in a checkout is the working tree, changed files included.

Sources alone are taken, so data, checkpoints, results and whatever else lies in a checkout cannot get in.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipelines.job import code_version
from userrep.config import HASH_CHARS, ConfigError

PACKAGES = ("pipelines", "userrep")
SUFFIXES = (".py", ".j2")  # as [tool.setuptools] in pyproject.toml
MAX_BYTES = 20 << 20  # the code is 1.5 MB; Ray keeps what is sent in the memory of the head
NUM_SHOWN = 5


@dataclass(frozen=True)
class Package:
    """Files of a source tree.

    Attributes:
        root: directory of the packages.
        files: relative to it, sorted.
        num_bytes: of all files.
        digest: 12 hex digits of names and contents.
    """

    root: Path
    files: tuple[Path, ...]
    num_bytes: int
    digest: str


def find_package(root: Path | None = None, max_bytes: int = MAX_BYTES) -> Package:
    """Selects the sources.

    Args:
        root: directory of the packages; default: that of the code which runs.
        max_bytes: that all may have together.

    Raises:
        ConfigError: no sources, a link that leads out of the tree, or too many bytes.
    """
    root = Path(__file__).parents[1] if root is None else root
    files = sorted(
        path.relative_to(root)
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.suffix in SUFFIXES and path.is_file()
    )
    if {path.parts[0] for path in files} != set(PACKAGES):
        raise ConfigError(f"{root} does not hold the sources of {' and '.join(PACKAGES)}: nothing can be sent")
    for path in files:
        if not (root / path).resolve().is_relative_to(root.resolve()):
            raise ConfigError(f"{root / path} is a link out of the source tree: put the file itself there")
    sizes = {path: (root / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > max_bytes:
        largest = sorted(files, key=lambda path: -sizes[path])[:NUM_SHOWN]
        shown = ", ".join(f"{path} ({sizes[path] / 2**20:.1f} MiB)" for path in largest)
        raise ConfigError(
            f"the sources have {total / 2**20:.1f} MiB, allowed are {max_bytes / 2**20:.1f}; the largest: {shown}. "
            "Move what is no code out of the packages"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.as_posix()}\0".encode() + hashlib.sha256((root / path).read_bytes()).digest())
    return Package(root, tuple(files), total, digest.hexdigest()[:HASH_CHARS])


def write_package(package: Package, directory: Path, extra: dict[str, bytes]) -> None:
    """Copies the files, with what makes them an installed distribution: tables record its version.

    Args:
        package: to be copied.
        directory: an empty one, which becomes the working directory of the job.
        extra: further files by name.
    """
    for path in package.files:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package.root / path, directory / path)
    version = code_version()
    info = directory / f"userrep-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: userrep\nVersion: {version}\n")
    for name, content in extra.items():
        (directory / name).write_bytes(content)
