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
from userrep import storage, table_versions
from userrep.manifest import FileEntry, IncompleteTableError, Manifest, describe_file, write_manifest


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
        """Hashes every file of the table, those that tasks elsewhere have sent too, and writes the manifest.

        Args:
            table: name of the kind of table.
            facts: table-specific facts; `rows` among them.
            rows: rows of the files where known, by relative path.
        """
        storage.receive(self.directory, "*")
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
    """Runs stages in a working directory; one whose table is complete and made from the same things is skipped.

    The working directory may be a mirror of one in object storage (`userrep/storage.py`).
    """

    config: JobConfig
    workdir: Path
    console: Console
    reports: list[StageReport] = field(default_factory=list)

    def path(self, table: str) -> Path:
        """Directory of a table, with all of it on this node."""
        return table_versions.open_table(self.workdir / table)

    def manifest(self, table: str) -> Manifest:
        """Manifest of a committed table."""
        return storage.manifest_of(table_versions.current(self.workdir / table))

    def plan(self, tables: dict[str, str]) -> dict[str, str]:
        """What a run would do with each stage, judged by which tables exist; nothing is written.

        Args:
            tables: the table of every stage.
        """
        exists = {stage: self._find(table) is not None for stage, table in tables.items()}
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
        storage.refresh(timing)
        if (current := self._current(table, config, digests)) is not None:
            seconds = float(timing.read_text()) if timing.is_file() else 0.0
            self.console.say(f"{stage}: complete and unchanged, skipped")
            self.reports.append(StageReport(stage, seconds, current.facts.get("rows", 0), is_skipped=True))
            return
        self.console.say(f"{stage}: started")
        started = time.perf_counter()
        with table_versions.staged_table(self.workdir / table) as staging:
            write(Draft(staging, stage, config, digests))
        seconds = time.perf_counter() - started
        timing.parent.mkdir(exist_ok=True)
        timing.write_text(f"{seconds:.3f}")
        storage.send(timing.parent, timing.name)
        rows = self.manifest(table).facts.get("rows", 0)
        self.console.say(f"{stage}: {rows:,} rows in {seconds:.1f} s")
        self.reports.append(StageReport(stage, seconds, rows, is_skipped=False))

    def _current(self, table: str, config: dict[str, Any], inputs: dict[str, str]) -> Manifest | None:
        manifest = self._find(table)
        return manifest if manifest and manifest.config == config and manifest.inputs == inputs else None

    def _find(self, table: str) -> Manifest | None:
        try:
            return self.manifest(table)
        except IncompleteTableError:
            return None


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
