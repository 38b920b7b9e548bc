"""One run of a sweep that comes back with new data: a directory named by its date, compared with the last finished one.

    root/2026-11-16/report/fit.json     a sweep is finished when it has this file
    root/2026-11-23/                    this one runs; a second start on the same day goes on with it
    root/latest -> 2026-11-16           what readers open; moves in one step, after the sweep

Schedulers start `python -m pipelines.sweep_recurring` with a `RecurringSweep` as JSON, the first argument or the
environment variable USERREP_RECURRING_SWEEP.
"""

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator

from userrep.config import Config, ConfigError

REQUEST_VARIABLE = "USERREP_RECURRING_SWEEP"
DATE = "{date}"  # stands for the date of the run in `data` and `overrides`
FIT = Path("report") / "fit.json"
POINTER = "latest"
SWEEP_NAME = re.compile(r"\d{4}-\d{2}-\d{2}")


class RecurringSweep(Config):
    """What is run each time.

    Attributes:
        config: of the sweep, as `userrep sweep run --config` takes it.
        root: absolute directory of all runs of this schedule.
        data: path of the raw data; `{date}` in it is the date of the run.
        overrides: of the sweep's config, key=value; `{date}` likewise.
        max_hours: cells that would end later are not begun.
        flops_per_s: throughput of a lane, which prices the cells; None: measured by the process that starts the sweep.
        time_zone: IANA name, in which the day begins that names the directory.
    """

    config: str = Field(min_length=1)
    root: str
    data: str | None = None
    overrides: tuple[str, ...] = ()
    max_hours: float = Field(default=24.0, gt=0)
    flops_per_s: float | None = Field(default=None, ge=1)
    time_zone: str = "UTC"

    @field_validator("root")
    @classmethod
    def _root_is_absolute_path(cls, root: str) -> str:
        if "://" in root:
            raise ValueError(
                "sweeps need a directory: checkpoints are moved, which an object store cannot; mount the bucket (with "
                "a driver that can rename, as a persistent volume claim in Kubernetes) and give the path"
            )
        if not root.startswith("/"):
            raise ValueError("must be an absolute path: schedulers start in a directory of their own")
        return root

    @field_validator("time_zone")
    @classmethod
    def _time_zone_exists(cls, name: str) -> str:
        find_time_zone(name)
        return name


def find_time_zone(name: str) -> tzinfo:
    """Time zone of an IANA name; UTC needs no database of time zones.

    Raises:
        ConfigError: unknown, or this machine has no such database.
    """
    if name in ("UTC", "Etc/UTC"):
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(
            f"time zone {name!r} is not known here; allowed: IANA names as Asia/Seoul, or UTC (an image without "
            "time zones needs the package tzdata)"
        ) from error


def sweep_name(now: datetime) -> str:
    """Name of the run that starts at this time: its date, so that another start on that day continues it."""
    return now.strftime("%Y-%m-%d")


def latest_finished(root: Path, before: str | None = None) -> Path | None:
    """Newest finished sweep below a root; None where there is none.

    Args:
        root: directory of the runs; it need not exist.
        before: name of a run; only older ones count, so that a run is not compared with itself.
    """
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    for name in sorted(filter(SWEEP_NAME.fullmatch, names), reverse=True):
        if (before is None or name < before) and (root / name / FIT).is_file():
            return root / name
    return None


def move_pointer(root: Path, sweep: Path) -> Path:
    """Lets `root/latest` be this sweep; a reader sees the old one or the new one, never none.

    Raises:
        ConfigError: something else than a link has the name of the pointer.
    """
    pointer = root / POINTER
    if pointer.exists() and not pointer.is_symlink():
        raise ConfigError(f"{pointer} is not a link; move it away: the link to the latest finished sweep goes there")
    # Relative, so that it holds where the storage is mounted elsewhere; of a name that no other start uses.
    staged = root / f".{POINTER}-{uuid.uuid4().hex}"
    staged.symlink_to(sweep.name)
    os.replace(staged, pointer)
    return pointer


def sweep_command(request: RecurringSweep, name: str, compare_with: Path | None) -> list[str]:
    """Arguments of the sweep's process; the interpreter is this one, for a scheduler's PATH is short."""
    command = [sys.executable, "-m", "pipelines.cli", "sweep", "run", "--config", request.config]
    command += ["--workdir", str(Path(request.root) / name), "--max-hours", f"{request.max_hours:g}"]
    if request.data is not None:
        command += ["--data", request.data.replace(DATE, name)]
    if request.flops_per_s is not None:
        command += ["--flops-per-s", repr(request.flops_per_s)]
    for override in request.overrides:
        command += ["--set", override.replace(DATE, name)]
    return command if compare_with is None else [*command, "--compare-with", str(compare_with)]


def run_recurring(
    request: RecurringSweep, now: datetime, call: Callable[[Sequence[str]], int] = subprocess.call
) -> int:
    """Runs the sweep of this day, then moves the pointer to the newest finished one.

    Args:
        request: what to run.
        now: with a time zone.
        call: runs a command and returns its exit status.

    Returns:
        Exit status of the sweep; where it is not 0, the pointer stays.
    """
    root, name = Path(request.root), sweep_name(now.astimezone(find_time_zone(request.time_zone)))
    root.mkdir(parents=True, exist_ok=True)
    status = call(sweep_command(request, name, latest_finished(root, before=name)))
    newest = latest_finished(root)
    # The newest, not this one: where last week's run is finished late, readers keep what is newer.
    if status == 0 and newest is not None:
        move_pointer(root, newest)
    return status


def main(arguments: Sequence[str]) -> int:
    """Entry point of schedulers; a request that cannot be read ends with one clear message."""
    text = arguments[0] if arguments else os.environ.get(REQUEST_VARIABLE, "")
    try:
        return run_recurring(RecurringSweep.model_validate_json(text), datetime.now(UTC))
    except ValueError as error:
        sys.stderr.write(f"userrep: recurring sweep, received {text!r}: {error}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
