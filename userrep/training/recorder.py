"""What a run leaves in its directory: ledger, metrics, checkpoints, evidence of a failure."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from userrep import storage
from userrep.manifest import write_json
from userrep.training.checkpoint import BEST_METRIC
from userrep.training.checkpoint_writer import CheckpointWriter
from userrep.training.fence import LINE_AGE_S, Attempt, patiently
from userrep.training.ledger import LEDGER_NAME, Ledger
from userrep.training.log_pieces import LogPieces, receive_log
from userrep.training.state import NonFiniteLossError, TrainState
from userrep.training.tracking import MetricSpool


class Recorder:
    """Writes for rank 0, every time only after it has made sure that its attempt is the newest one."""

    def __init__(
        self, attempt: Attempt, checkpoints: Path, spool: Path, config: dict[str, Any], keep: int, start_step: int
    ) -> None:
        """Opens or continues the files of a run.

        Args:
            attempt: that writes; in object storage, its directory is a mirror of its own (`storage.private`).
            checkpoints: directory of the run's checkpoints.
            spool: file of its metrics.
            config: resolved config of the run.
            keep: newest checkpoints to retain.
            start_step: steps taken before the attempt.
        """
        ledger = attempt.run_dir / LEDGER_NAME
        self._attempt, self._paths = attempt, (ledger, spool)
        for path in self._paths:
            patiently(partial(receive_log, path))
        self._pieces = [LogPieces(path, attempt.number) for path in self._paths]
        self._ledger = patiently(lambda: Ledger(ledger, attempt.number, start_step))
        self._spool = patiently(lambda: MetricSpool(spool))
        self.writer = CheckpointWriter(checkpoints, config, keep, attempt, self._sync)

    def record(self, state: TrainState, metrics: dict[str, float], is_urgent: bool = False) -> None:
        """Records a step, and saves the state where it was validated, or where a checkpoint is due or urgent.

        Args:
            state: after the step.
            metrics: of the step. Those of a step that is saved also get `time/checkpoint_stall_s`, what the last
                checkpoint has cost the step, and `time/checkpoint_interval_s`, how often that makes them due.
            is_urgent: save unless a checkpoint is on its way.

        Raises:
            StaleAttemptError: a newer attempt has the run; nothing was written.
            OSError: storage has failed for longer than `STORAGE_PATIENCE_S`.
        """
        self.writer.poll()
        is_validated, time_ms = BEST_METRIC in metrics, int(time.time() * 1000)
        saves = is_validated or self.writer.is_due(is_urgent)
        if saves and self.writer.interval_s:  # what the checkpoint before this one has shown
            metrics = metrics | {
                "time/checkpoint_stall_s": self.writer.stall_s,
                "time/checkpoint_interval_s": self.writer.interval_s,
            }

        def append_line() -> None:
            self._attempt.check(LINE_AGE_S)
            self._ledger.append(state.step, state.batch_hash, state.samples_seen, time_ms, metrics["train/loss"])

        def append_metrics() -> None:
            self._attempt.check(LINE_AGE_S)
            self._spool.write(state.step, time_ms, metrics)

        patiently(append_line)
        patiently(append_metrics)
        if saves:
            self.writer.save(state, metrics)

    def finish(self) -> None:
        """Returns when the disk has the last checkpoint; raises what has kept it from being written."""
        self.writer.wait()

    def close(self) -> None:
        """Closes all files, after an error too."""
        self.writer.close()
        self._ledger.close()
        self._spool.close()

    def _sync(self) -> None:
        # Steps before a checkpoint are never taken again, so their lines must be as durable as the checkpoint.
        for path in self._paths:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        for pieces in self._pieces:
            self._attempt.check()
            pieces.send()


def evidence_path(attempt: Attempt, error: NonFiniteLossError) -> Path:
    """Where `write_evidence` keeps it."""
    return attempt.run_dir / f"non-finite-step-{error.evidence['step']:08d}.json"


def write_evidence(attempt: Attempt, error: NonFiniteLossError) -> None:
    """Keeps what is known of a step that could not be taken, the same on every rank."""
    attempt.check()
    path = evidence_path(attempt, error)
    write_json(path, {"attempt": attempt.number, "message": str(error), **error.evidence})
    storage.send(path.parent, path.name)
