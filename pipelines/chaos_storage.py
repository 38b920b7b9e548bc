"""What can be done to the files of a run: a bit flipped, a file cut short, a directory made read-only for a while."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.chaos_schedule import Fault


def damage_checkpoint(checkpoint: Path, fault: Fault) -> tuple[Path, str]:
    """Flips a bit of one file of a checkpoint, or cuts the file short.

    Args:
        checkpoint: its directory.
        fault: `choice` names the file, `place` the byte, `bit` the bit.

    Returns:
        The file, and what was done in words.
    """
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.stat().st_size)
    path = files[int(fault.choice * len(files))]
    size = path.stat().st_size
    place = int(fault.place * size)
    with path.open("r+b") as stream:
        if fault.kind == "truncation":
            stream.truncate(place)
            return path, f"{checkpoint.name}/{path.name} cut from {size} to {place} bytes"
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << fault.bit)]))
    return path, f"{checkpoint.name}/{path.name}: bit {fault.bit} of byte {place} of {size} flipped"


@contextmanager
def storage_lock(directory: Path) -> Iterator[None]:
    """Makes a directory and everything in it read-only for the duration of the block, for root as well.

    What it simulates is storage that was remounted read-only: nothing can be created, renamed, removed or written. What
    a process sees is EPERM (root: the immutable attribute of the file system) or EACCES (others: permissions, which
    files that are open already do not feel) instead of EROFS.
    """
    _set_writable(directory, is_writable=False)
    try:
        yield
    finally:
        _set_writable(directory, is_writable=True)


def unlock(directory: Path) -> None:
    """Makes a directory writable that a killed process left locked; harmless for any other."""
    if directory.exists():
        _set_writable(directory, is_writable=True)


def can_lock_storage(directory: Path) -> bool:
    """Whether `storage_lock` binds in this directory: tries it out in a new one below it."""
    probe = directory / ".lock-probe"
    probe.mkdir(parents=True, exist_ok=True)
    try:
        with storage_lock(probe):
            try:
                (probe / "file").touch()
            except OSError:
                return True
        return False
    finally:
        shutil.rmtree(probe)


def _set_writable(directory: Path, is_writable: bool) -> None:
    """From the top down, so that nothing new appears below a directory that is done."""
    if os.geteuid() == 0:
        if (chattr := shutil.which("chattr")) is not None:
            # Its exit code also tells of files that vanished meanwhile; whether it worked is what the probe is for.
            command = [chattr, "-R", "-i" if is_writable else "+i", str(directory)]
            subprocess.run(command, check=False, capture_output=True)
        return
    for root, _, names in os.walk(directory):
        for path in (Path(root), *(Path(root) / name for name in names)):
            if path.exists() and not path.is_symlink():
                mode = stat.S_IMODE(path.stat().st_mode)
                path.chmod(mode | stat.S_IWUSR if is_writable else mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
