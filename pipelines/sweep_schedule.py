"""A sweep that comes back: when, what and where, and its line in a crontab. Manifests are in `sweep_kubernetes.py`."""

import shlex
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from pipelines.cron import CronExpression, parse_cron
from pipelines.kubernetes_config import MAX_NAME_CHARS, NAME
from pipelines.rendered_text import check_text, texts_of
from pipelines.sweep_recurring import RecurringSweep
from userrep.config import Config

LOCK, LOG = ".schedule.lock", "schedule.log"
STATUS_LOCKED = 75  # EX_TEMPFAIL of sysexits.h; sweeps end with 0, 1 or 2


class ScheduleConfig(Config):
    """When a sweep is run, and what.

    Attributes:
        name: of the schedule, a DNS label; objects in Kubernetes have it.
        cron: five fields, at most one time a day, because runs are named by their date.
        sweep: what is run, with the time zone of `cron`.
        mlflow_uri: tracking server without credentials; None: the database in the working directory.
        suspend: render it, but start nothing.
    """

    name: str = Field(default="userrep-sweep", pattern=f"^{NAME}$", max_length=MAX_NAME_CHARS)
    cron: str
    sweep: RecurringSweep
    mlflow_uri: str | None = None
    suspend: bool = False

    @field_validator("cron")
    @classmethod
    def _cron_fires_once_a_day(cls, text: str) -> str:
        found = parse_cron(text)
        if found.times_per_day > 1:
            raise ValueError(
                f"fires {found.times_per_day} times a day; a run is named by its date, so one minute and one hour are "
                "allowed, e.g. '0 3 * * 1'"
            )
        return found.text

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        for text in texts_of(self.model_dump()):
            check_text(text)
        return self

    @property
    def expression(self) -> CronExpression:
        """The parsed `cron`."""
        return parse_cron(self.cron)


def render_crontab(schedule: ScheduleConfig, python: str, env_file: str | None = None) -> str:
    """Lines of a crontab; a start that finds the last sweep still running does nothing.

    Cron mails what a command prints, so the line prints only where the sweep failed or was left out; all else is in
    the log.

    Args:
        schedule: what to run.
        python: absolute path of an interpreter that has the package.
        env_file: absolute path of a file of `NAME=value` lines with credentials, readable by its owner only.

    Raises:
        ValueError: a relative path, or a text that cron cannot hold.
    """
    for path in (python, env_file or "/"):
        check_text(path)
        if not path.startswith("/"):
            raise ValueError(f"{path!r} is a relative path; cron starts in the home directory, so give an absolute one")
    line = f"{schedule.cron} {escape_cron(_shell_command(schedule, python, env_file))}"
    zone = schedule.sweep.time_zone
    lines = [
        f"# {schedule.name}: scaling-law sweep with the newest data, into {schedule.sweep.root}/<date>.",
        # No CRON_TZ line: Debian's cron ignores it, and in cronie it would move all lines below it as well.
        f"# Cron reads the time in the machine's time zone; the date of a run is that of {zone}.",
        f"# suspended: {line}" if schedule.suspend else line,
    ]
    return "\n".join(lines) + "\n"


def escape_cron(command: str) -> str:
    r"""A shell command for a crontab, where a bare % is a line break and `\%` a %, inside of quotes too.

    Raises:
        ValueError: a backslash before a %, which crons read differently.
    """
    if "\\%" in command:
        raise ValueError(f"{command!r} has a backslash before a %, which cron cannot be given; rename the path")
    return command.replace("%", r"\%")


def _shell_command(schedule: ScheduleConfig, python: str, env_file: str | None) -> str:
    root = Path(schedule.sweep.root)
    log = str(root / LOG)
    start = ["flock", "-n", "-E", str(STATUS_LOCKED), str(root / LOCK)]
    start += [python, "-m", "pipelines.sweep_recurring", schedule.sweep.model_dump_json(exclude_none=True)]
    steps = [f"mkdir -p {shlex.quote(str(root))}"]
    if env_file is not None:
        steps.append(f"set -a && . {shlex.quote(env_file)} && set +a")
    if schedule.mlflow_uri is not None:
        steps.append(f"export MLFLOW_TRACKING_URI={shlex.quote(schedule.mlflow_uri)}")
    steps.append(f"{shlex.join(start)} >> {shlex.quote(log)} 2>&1")
    failed = f"{schedule.name} ended with status $? ({STATUS_LOCKED}: the last one still runs); see"
    return f'{{ {" && ".join(steps)}; }} || echo "{failed}" {shlex.quote(log)}'
