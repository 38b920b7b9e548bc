"""Which local path mirrors which place in object storage, and back.

The mirror of `s3://bucket/key` is `<scratch>/userrep-objects/s3/bucket/key` on every node, from which the URI can be
read off. So a `Path` is a reference that can be sent to any process, and holds neither endpoint nor credentials.
"""

import os
import re
import tempfile
from pathlib import Path

from userrep.config import ConfigError

SCRATCH_VARIABLE = "USERREP_SCRATCH"  # directory for mirrors; has to be the same on all nodes
MIRROR = "/userrep-objects/s3/"  # before the bucket
URI = re.compile(r"s3:/{1,2}([a-z0-9][a-z0-9.-]+)(?:/(.*))?")  # `Path` makes one slash of two


def locate(text: str | Path) -> Path:
    """The absolute path for what a user wrote: a path, or `s3://bucket/key`, which becomes its mirror.

    Raises:
        ConfigError: a URI that names no bucket, or is of another kind of storage.
    """
    if (found := URI.fullmatch(str(text))) is not None:
        parts = [part for part in (found[2] or "").split("/") if part]
        if ".." in parts or "." in parts:
            raise ConfigError("a key of an object must not hold `.` or `..` as a part")
        return mirror_in(scratch(), "/".join([found[1], *parts]))
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(text)):
        raise ConfigError(
            f"{str(text).partition(':')[0]}: is no storage that this reads, or the rest is no bucket and key: give a "
            "path, or s3://BUCKET/KEY with credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return Path(text).absolute()


def scratch() -> Path:
    """This user's directory for mirrors."""
    if SCRATCH_VARIABLE in os.environ:
        return Path(os.environ[SCRATCH_VARIABLE]).absolute()
    path = Path(tempfile.gettempdir()) / f"userrep-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to another user: set {SCRATCH_VARIABLE} to a directory of your own")
    return path


def object_name(path: Path) -> str | None:
    """`bucket/key` of a mirror; None for any other path."""
    _, found, name = str(path).partition(MIRROR)
    return name if found else None


def scratch_of(mirror: Path) -> Path:
    """The directory for mirrors in which a mirror lies."""
    return Path(str(mirror).partition(MIRROR)[0])


def mirror_in(directory: Path, name: str) -> Path:
    """The mirror of `bucket/key` in another directory for mirrors."""
    return Path(f"{directory}{MIRROR}{name}")


def shown(path: Path) -> str:
    """What people know the path as."""
    name = object_name(path)
    return str(path) if name is None else f"s3://{name}"
