"""One training run: issued, hit by a fault at its step, and issued again until it is finished."""

import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipelines.chaos_rig import Rig, Session, is_alive, kill, send, wait_until
from pipelines.chaos_schedule import DAMAGES, Fault
from pipelines.chaos_storage import damage_checkpoint, storage_lock
from userrep.manifest import MANIFEST_NAME
from userrep.training.checkpoint import CHECKPOINTS, checkpoint_step, list_checkpoints
from userrep.training.fence import ATTEMPT_NAME
from userrep.training.ledger import LEDGER_NAME, read_ledger

MAX_COMMANDS = 6
COMMAND_LIMIT_S = 240  # assumption: five times what a command takes here, starts of Ray and a recovery included
HANG_LIMIT_S = 30  # after which a stopped worker must have become an error
STORAGE_LOCK_S = 10


@dataclass
class Strike:
    """What a fault did.

    Attributes:
        what: in words; empty when it found nothing to hit.
        time_ms: when, on the clock of the run's ledger.
        step: steps in the ledger by then.
        hang_s: of a stopped worker, seconds until its silence was an error; None for other faults.
        damaged_step: of the checkpoint that was damaged so that it must not be restored; None: there is none.
    """

    what: str = ""
    time_ms: int = 0
    step: int = 0
    hang_s: float | None = None
    damaged_step: int | None = None


@dataclass
class Run:
    """A training run in a job directory, seen from outside."""

    rig: Rig
    job_dir: Path
    tracking_uri: str
    has_own_cluster: bool = False
    num_commands: int = 0
    problems: list[str] = field(default_factory=list)
    command: Session | None = None

    def issue(self) -> None:
        """Issues the command, for the first time or again."""
        self.command = self.rig.issue("pretrain", self.job_dir, self.tracking_uri, self.has_own_cluster)
        self.num_commands += 1

    @property
    def is_running(self) -> bool:
        """Whether the command runs."""
        return self.command is not None and self.command.is_running

    @property
    def run_dir(self) -> Path:
        """Where the command keeps its progress; a path that does not exist until it has begun."""
        return next((self.job_dir / "runs").glob("*/"), self.job_dir / "runs" / "none")

    def lines(self) -> list[dict[str, Any]]:
        """Its ledger so far."""
        return read_ledger(self.run_dir / LEDGER_NAME)

    def step(self) -> int:
        """Steps taken so far."""
        return max((line["step"] for line in self.lines()), default=0)

    def attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        path = self.run_dir / ATTEMPT_NAME
        return int(json.loads(path.read_text())["attempt"]) if path.is_file() else 0

    def session(self) -> Session:
        """The session in which its workers live."""
        assert self.command is not None
        return self.command if self.has_own_cluster else self.rig.cluster()

    def workers(self) -> list[psutil.Process]:
        """Its living workers, oldest first."""
        return self.session().train_workers()

    def finish(self) -> None:
        """Waits for the end of the command; one that failed is issued again, one that hangs is killed before."""
        while self.command is not None:
            if not wait_until(lambda: not self.is_running, COMMAND_LIMIT_S):
                self.problems.append(f"command {self.num_commands} was not done after {COMMAND_LIMIT_S} s")
                self.command.kill()
            if self.command.process.returncode == 0:
                return
            if self.num_commands == MAX_COMMANDS:
                self.problems.append(f"{MAX_COMMANDS} commands have failed; see {self.job_dir / 'command.log'}")
                return
            self.issue()


def strike(run: Run, fault: Fault, server: Any) -> Strike:
    """Waits for the step of the fault, does it, and returns when it is over. The run may have ended by then.

    Args:
        run: a run that was issued.
        fault: what to do.
        server: the MLflow server of the run, where that is what is hit.
    """

    def is_due() -> bool:
        has_checkpoint = fault.kind not in DAMAGES or bool(list_checkpoints(run.run_dir / CHECKPOINTS))
        return not run.is_running or (run.step() >= fault.step and has_checkpoint)

    wait_until(is_due, COMMAND_LIMIT_S)
    result = Strike(time_ms=_now_ms(), step=run.step())
    if not run.is_running:
        return result
    match fault.kind:
        case "worker":
            if workers := run.workers():
                victim = _choose(workers, fault.choice)
                kill(victim)
                result.what = f"worker {victim.pid} of {len(workers)} killed"
        case "driver":
            assert run.command is not None
            os.kill(run.command.process.pid, signal.SIGKILL)
            result.what = "driver killed" + (" with its own cluster" if run.has_own_cluster else "")
        case "raylet":
            if raylets := run.session().raylets():
                kill(raylets[0])
                result.what = f"raylet {raylets[0].pid} killed"
        case "stop":
            _stop_worker(run, fault, result)
        case "bit_flip" | "truncation":
            _damage(run, fault, result)
        case "mlflow":
            server.kill()
            result.what = f"MLflow at {server.uri} killed"
        case "storage":
            with storage_lock(run.run_dir):
                time.sleep(STORAGE_LOCK_S)
            result.what = f"{run.run_dir.name} read-only for {STORAGE_LOCK_S} s"
        case "node":
            _replace_node(run, fault, result)
    return result


def _stop_worker(run: Run, fault: Fault, result: Strike) -> None:
    workers, attempt = run.workers(), run.attempt()
    if not workers:
        return
    victim = _choose(workers, fault.choice)
    send(victim, signal.SIGSTOP)
    wait_until(lambda: not run.is_running or not is_alive(victim) or run.attempt() > attempt, COMMAND_LIMIT_S)
    # Ray Train then takes some seconds to end the other workers, and longer to end the one that does not answer.
    noticed_ms = run.rig.first_failure_ms(result.time_ms) or _now_ms()
    result.hang_s = (noticed_ms - result.time_ms) / 1000
    result.what = f"worker {victim.pid} of {len(workers)} stopped"
    # What comes back, like a machine that was cut off, comes back when others have gone on without it.
    wait_until(lambda: not run.is_running or _newest_attempt(run) > attempt, COMMAND_LIMIT_S)
    if is_alive(victim):
        send(victim, signal.SIGCONT)
        result.what += ", and woken while its successor trained"


def _damage(run: Run, fault: Fault, result: Strike) -> None:
    # Stopped first, so that the checkpoint is still the newest one when they die.
    workers = run.workers()
    if not workers:  # a damage that nobody has to restore from would prove nothing
        return
    for worker in workers:
        send(worker, signal.SIGSTOP)
    newest = list_checkpoints(run.run_dir / CHECKPOINTS)[-1]
    step = checkpoint_step(newest)
    damaged, result.what = damage_checkpoint(newest, fault)
    if damaged.name != MANIFEST_NAME:  # it has no checksum, and parts of it that nothing depends on
        result.damaged_step = step
    for worker in workers:
        kill(worker)


def _replace_node(run: Run, fault: Fault, result: Strike) -> None:
    raylets = {raylet.pid for raylet in run.session().raylets()}
    nodes = sorted({worker.ppid() for worker in run.workers()} & raylets)
    if not nodes:
        return
    victim = nodes[int(fault.choice * len(nodes))]
    if run.rig.ask_cluster(f"replace {victim}") == "replaced":
        result.what = f"node of raylet {victim}, one of {len(nodes)} that train, killed and replaced"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _newest_attempt(run: Run) -> int:
    return max((line["attempt"] for line in run.lines()), default=0)


def _choose(workers: list[psutil.Process], choice: float) -> psutil.Process:
    return workers[int(choice * len(workers))]
