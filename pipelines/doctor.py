"""`userrep doctor`: what would keep a job from running on this machine, and what to do about it."""

import logging
import os
import platform
import shutil
import socket
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from pipelines.mlflow_store import local_tracking_uri
from pipelines.mlflow_store import tracking_uri as choose_uri
from userrep import storage
from userrep.config import ConfigError
from userrep.mirror import object_name, shown

MIN_MEMORY_BYTES = 6 << 30  # what the demo takes
MIN_DISK_BYTES = 5 << 30
MIN_SHM_BYTES = 1 << 30
PACKAGES = ("pyarrow", "mlflow-skinny", "mlflow", "torch", "ray", "transformers", "tokenizers", "safetensors")
RAY_PORTS = {"Ray GCS": 6379, "Ray dashboard": 8265}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. `level` is OK, WARN or FAIL."""

    level: str
    what: str
    detail: str


def diagnose(workdir: Path, tracking_uri: str | None, is_fixing: bool = False) -> list[Finding]:
    """Runs all checks.

    Args:
        workdir: of jobs; need not exist.
        tracking_uri: of MLflow; default: MLFLOW_TRACKING_URI, else the database of `workdir`.
        is_fixing: end the runs in MLflow whose job is dead. Without it, nothing is changed.
    """
    return [
        _python(),
        *_packages(),
        _cores(),
        _memory(),
        _shared_memory(),
        _storage(workdir),
        *_ports(),
        _ray(),
        *_mlflow(workdir, tracking_uri, is_fixing),
    ]


def _python() -> Finding:
    return Finding("OK", "python", platform.python_version())


def _packages() -> list[Finding]:
    findings = []
    for package in PACKAGES:
        try:
            findings.append(Finding("OK", package, version(package)))
        except PackageNotFoundError:
            findings.append(Finding("WARN", package, "not installed; stages need it: pip install 'userrep[train]'"))
    return findings


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        return Finding("FAIL", "cores", f"{cores}; training and its input (Ray Data) need one CPU each")
    return Finding("OK", "cores", f"{cores}: {cores - 1} for training, 1 free for Ray Data")


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    level = "OK" if available >= MIN_MEMORY_BYTES else "WARN"
    return Finding(
        level, "memory", f"{available / 2**30:.1f} GiB available; the demo takes up to {MIN_MEMORY_BYTES / 2**30:.0f}"
    )


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.exists():
        return Finding(
            "WARN", "shared memory", "no /dev/shm; Ray keeps its object store in a slower temporary directory"
        )
    free = shutil.disk_usage(path).free
    if free < MIN_SHM_BYTES:
        return Finding(
            "WARN", "shared memory", f"/dev/shm has {free / 2**20:.0f} MiB; start the container with --shm-size=2g"
        )
    return Finding("OK", "shared memory", f"{free / 2**30:.1f} GiB")


def _storage(workdir: Path) -> Finding:
    if object_name(workdir) is not None:
        try:
            storage.check(workdir)
        except OSError as error:
            return Finding("FAIL", "storage", str(error))
        return Finding("OK", "storage", f"{shown(workdir)} can be written, read and deleted")
    existing = next(path for path in [workdir.resolve(), *workdir.resolve().parents] if path.exists())
    if not os.access(existing, os.W_OK):
        return Finding("FAIL", "storage", f"{existing} is not writable; choose another --workdir")
    free = shutil.disk_usage(existing).free
    level = "OK" if free >= MIN_DISK_BYTES else "WARN"
    return Finding(level, "storage", f"{free / 2**30:.0f} GiB free at {existing}")


def _ports() -> list[Finding]:
    findings = []
    for name, port in RAY_PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(0.5)
            is_taken = probe.connect_ex(("127.0.0.1", port)) == 0
        detail = (
            f"{port} answers: a cluster runs here, or another program has the port" if is_taken else f"{port} is free"
        )
        findings.append(Finding("OK", name, detail))
    return findings


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return Finding("OK", "ray cluster", "RAY_ADDRESS is not set: a job starts a local cluster for itself")
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        cpus = ray.available_resources().get("CPU", 0)
        ray.shutdown()
    except (ConnectionError, RuntimeError, ValueError) as error:
        return Finding("FAIL", "ray cluster", f"RAY_ADDRESS={address} cannot be reached: {str(error).splitlines()[0]}")
    if cpus < 2:
        return Finding("FAIL", "ray cluster", f"{cpus:g} CPUs free; training and Ray Data need one each")
    return Finding("OK", "ray cluster", f"{cpus:g} CPUs free at {address}")


def _mlflow(workdir: Path, option: str | None, is_fixing: bool) -> list[Finding]:
    from userrep.publishing.client import list_tables
    from userrep.publishing.connection import redacted

    try:
        uri = choose_uri(workdir, option)
    except ConfigError as error:
        return [Finding("FAIL", "mlflow", str(error))]
    if object_name(workdir) is None and uri == local_tracking_uri(workdir) and not (workdir / "mlflow.db").exists():
        return [Finding("OK", "mlflow", "MLFLOW_TRACKING_URI is not set: a database in --workdir is used")]
    try:
        tables = list_tables(tracking_uri=uri)
        lost = _lost_runs(uri, is_fixing)
    except ValueError as error:
        return [Finding("FAIL", "mlflow", str(error))]
    return [Finding("OK", "mlflow", f"{redacted(uri)} answers, {len(tables)} embedding tables"), *lost]


def _lost_runs(uri: str, is_fixing: bool) -> list[Finding]:
    from userrep.publishing.connection import connect
    from userrep.training.heartbeat import end_lost_run, find_lost_runs

    findings = []
    with connect(uri) as client:
        for run in find_lost_runs(client, time.time()):
            silence = f"RUNNING in MLflow, last sign of life {(time.time() - run.last_beat_s) / 60:,.0f} minutes ago"
            if is_fixing:
                end_lost_run(client, run)
                findings.append(Finding("OK", f"run {run.name}", f"was {silence}: set to KILLED"))
            else:
                advice = "if its job is dead, `userrep doctor --fix` sets it to KILLED"
                findings.append(Finding("WARN", f"run {run.name}", f"{silence}: {advice}"))
    return findings
