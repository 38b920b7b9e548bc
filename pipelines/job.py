"""A job: a config, a working directory, and the stages that were run in it."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.config import JobConfig
from pipelines.console import Console
from userrep.manifest import (
    MANIFEST_NAME,
    FileEntry,
    IncompleteTableError,
    Manifest,
    describe_file,
    read_manifest,
    staged_directory,
    write_manifest,
)


@dataclass(frozen=True)
class StageReport:
    """What one stage did. `seconds` and `rows` of a skipped stage are those of the run that made its table."""

    stage: str
    seconds: float
    rows: int
    is_skipped: bool


@dataclass(frozen=True)
class Draft:
    """A table that is being written: a staging directory, and what its manifest will say."""

    directory: Path
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]

    def commit(self, table: str, facts: dict[str, Any], rows: dict[str, int] | None = None) -> None:
        """Hashes every file in the directory and writes the manifest.

        Args:
            table: name of the kind of table.
            facts: table-specific facts; `rows` among them.
            rows: rows of the files where known, by relative path.
        """
        files: tuple[FileEntry, ...] = tuple(
            describe_file(self.directory, path, (rows or {}).get(path.relative_to(self.directory).as_posix()))
            for path in sorted(self.directory.rglob("*"))
            if path.is_file()
        )
        write_manifest(
            self.directory,
            Manifest(table=table, stage=self.stage, config=self.config, inputs=self.inputs, files=files, facts=facts),
        )


@dataclass
class Job:
    """Runs stages in a working directory; one whose table is complete and made from the same things is skipped."""

    config: JobConfig
    workdir: Path
    console: Console
    reports: list[StageReport] = field(default_factory=list)

    def path(self, table: str) -> Path:
        """Directory of a table."""
        return self.workdir / table

    def manifest(self, table: str) -> Manifest:
        """Manifest of a committed table."""
        return read_manifest(self.path(table))

    def plan(self, tables: dict[str, str]) -> dict[str, str]:
        """What a run would do with each stage, judged by which tables exist; nothing is written.

        Args:
            tables: the table of every stage.
        """
        exists = {stage: (self.path(table) / MANIFEST_NAME).is_file() for stage, table in tables.items()}
        return {stage: "done; skipped if unchanged" if exists[stage] else "would run" for stage in tables}

    def run_stage(
        self, stage: str, table: str, config: dict[str, Any], inputs: tuple[str, ...], write: Callable[[Draft], None]
    ) -> None:
        """Writes `table` unless it is there already, and appends a report.

        Args:
            stage: its name, as in the command line.
            table: the table that it writes.
            config: resolved values that the table depends on.
            inputs: tables that it reads; an absolute path names one of another job.
            write: fills the draft's directory and commits the draft.
        """
        digests = {name: self.manifest(name).lineage() for name in inputs}
        timing = self.workdir / ".timings" / f"{table}.txt"
        if (current := self._current(table, config, digests)) is not None:
            seconds = float(timing.read_text()) if timing.is_file() else 0.0
            self.console.say(f"{stage}: complete and unchanged, skipped")
            self.reports.append(StageReport(stage, seconds, current.facts.get("rows", 0), is_skipped=True))
            return
        self.console.say(f"{stage}: started")
        started = time.perf_counter()
        with staged_directory(self.path(table)) as staging:
            write(Draft(staging, stage, config, digests))
        seconds = time.perf_counter() - started
        timing.parent.mkdir(exist_ok=True)
        timing.write_text(f"{seconds:.3f}")
        rows = self.manifest(table).facts.get("rows", 0)
        self.console.say(f"{stage}: {rows:,} rows in {seconds:.1f} s")
        self.reports.append(StageReport(stage, seconds, rows, is_skipped=False))

    def _current(self, table: str, config: dict[str, Any], inputs: dict[str, str]) -> Manifest | None:
        try:
            manifest = self.manifest(table)
        except IncompleteTableError:
            return None
        return manifest if manifest.config == config and manifest.inputs == inputs else None


def code_version() -> str:
    """Version of the installed package."""
    return version("userrep")


def code_commit() -> str:
    """Git commit of the code, from USERREP_COMMIT (an image has no repository) or the clone it lies in; else empty."""
    if stated := os.environ.get("USERREP_COMMIT"):
        return stated
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()
