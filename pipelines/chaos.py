"""`userrep chaos`: training under a seeded schedule of faults, each run compared with the one that nothing disturbed.

What it does is what a user does: commands `userrep pretrain` in processes of their own, issued again after they died.
`chaos.jsonl` holds a line for the undisturbed run, one for every disturbed run, and the verdict as the last one.
"""

import json
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import rich.console
import rich.table

from pipelines.chaos_rig import MlflowServer, Rig, prepare_job
from pipelines.chaos_run import COMMAND_LIMIT_S, HANG_LIMIT_S, Run, Strike, strike
from pipelines.chaos_schedule import INTERRUPTING, MEANING, Fault, kinds_for, make_schedule
from pipelines.chaos_storage import can_lock_storage, unlock
from pipelines.chaos_verdict import Outcome, check_plan, count_starts, find_differences, read_outcome, recovery_s
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.mlflow_store import local_tracking_uri
from pipelines.tokenize import TABLE as SHARDS
from userrep.config import ConfigError
from userrep.data.augment import AugmentConfig
from userrep.data.ingest import IngestConfig
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.tokenizer import TokenizeConfig
from userrep.models.clue import ClueConfig
from userrep.training.encoding import MemoryConfig
from userrep.training.optim import OptimConfig
from userrep.training.settings import CluePretraining, WorkersConfig

LEDGER = "chaos.jsonl"
NUM_WORKERS = 2
NO_LOCK = "read-only storage cannot be simulated here (as root it takes chattr and a file system that knows +i)"


def chaos_config() -> JobConfig:
    """The job that is disturbed: two workers, two epochs, a tiny encoder."""
    return JobConfig(
        name="chaos",
        source=SyntheticSource(num_users=4000, num_items=1000),
        ingest=IngestConfig(num_shards=2, row_group_size=256),
        tokenize=TokenizeConfig(vocab_size=512),
        pretrain=CluePretraining(
            model=ClueConfig(dim=16, num_heads=2, item_layers=2, service_layers=2),
            augment=AugmentConfig(cut="random", min_keep=0.5, max_events=32, token_drop=0.1),
            optim=OptimConfig(bag_steps=4),
            global_batch_size=768,
            num_steps=40,
            validate_every=5,
            pool_size=64,
        ),
        workers=WorkersConfig(num_workers=NUM_WORKERS, threads=1, memory=MemoryConfig(budget_mib=128)),
    )


def run_chaos(kills: int, seed: int, workdir: Path, nodes: int = 1) -> int:
    """Runs the schedule, prints a table of it and writes `chaos.jsonl`.

    Args:
        kills: faults, one in each run, >= 1.
        seed: of the schedule; the first faults of a longer schedule are those of a shorter one.
        workdir: for data, runs and ledger; an earlier chaos in it is replaced.
        nodes: nodes of the Ray cluster, 1..3; with several, nodes die instead of the raylet of a single one.

    Returns:
        Exit code: 0 when every run ended like the undisturbed one, else 1.

    Raises:
        ConfigError: an argument is out of its range, or the directory holds something else.
        RuntimeError: the undisturbed run, or what it needs, failed.
    """
    if kills < 1 or not 1 <= nodes <= NUM_WORKERS + 1:
        raise ConfigError(f"received {kills} kills on {nodes} nodes: give at least 1 kill, and 1 to {NUM_WORKERS + 1}")
    workdir, console, config = workdir.resolve(), Console(), chaos_config()
    if workdir.is_dir() and any(workdir.iterdir()) and not (workdir / LEDGER).is_file():
        raise ConfigError(
            f"{workdir} is not empty and holds no earlier chaos ({LEDGER}), whose runs would be replaced: "
            "give an empty or new --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / LEDGER).touch()
    for name in ("undisturbed", "runs"):
        unlock(workdir / name)
        shutil.rmtree(workdir / name, ignore_errors=True)
    can_lock = can_lock_storage(workdir)
    if not can_lock:
        console.say(f"chaos: {NO_LOCK}; this fault is left out")
    kinds = kinds_for(nodes, can_lock)
    steps = config.pretrain.num_steps, config.pretrain.validate_every
    started, records = time.monotonic(), []
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as ray_dir,
        Rig(workdir, Path(ray_dir), nodes) as rig,
        (workdir / LEDGER).open("w") as ledger,
    ):
        undisturbed = _run_undisturbed(rig, workdir, config, ledger, console)
        for fault in make_schedule(kills, seed, kinds, *steps, num_nodes=nodes):
            records.append(_run_disturbed(rig, workdir, config, fault, undisturbed))
            _append(ledger, records[-1])
            console.say(_line(records[-1], kills))
        verdict = {"verdict": "pass", **summarize(records), "seconds": round(time.monotonic() - started, 1)}
        if verdict["passed"] < kills:
            verdict["verdict"] = "fail"
        _append(ledger, {**verdict, "seed": seed, "nodes": nodes, "left_out": [] if can_lock else [NO_LOCK]})
    _show(records, verdict)
    return 0 if verdict["verdict"] == "pass" else 1


def judge(fault: Fault, hit: Strike, run: Run, outcome: Outcome, undisturbed: Outcome, num_steps: int) -> list[str]:
    """Everything that is wrong with a disturbed run; empty when it passes."""
    problems = [*run.problems, *find_differences(undisturbed, outcome, num_steps)]
    starts = count_starts(outcome.lines)
    if not hit.what:
        problems.append(f"the fault found nothing to hit: the run was at step {hit.step}, the fault is of {fault.step}")
    if hit.hang_s is not None and hit.hang_s > HANG_LIMIT_S:
        problems.append(f"a stopped worker became an error after {hit.hang_s} s, allowed are {HANG_LIMIT_S}")
    if hit.damaged_step is not None and hit.damaged_step in starts[1:2]:
        problems.append(f"the damaged checkpoint of step {hit.damaged_step} was restored")
    interrupted, issued_again = len(starts) > 1, run.num_commands > 1
    if hit.what and interrupted != (fault.kind in INTERRUPTING):
        problems.append("the training was interrupted" if interrupted else "the fault has not interrupted the training")
    if issued_again and not (fault.kind == "driver" or fault.has_own_cluster):
        problems.append("the command had to be issued again, although its driver and its cluster lived")
    return problems


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, time to recover over the runs that were interrupted, and useful steps over all steps."""
    recoveries = [record["recovery_s"] for record in records if len(record["starts"]) > 1]
    middle, high = np.percentile(recoveries, [50, 95]).round(2).tolist() if recoveries else (0.0, 0.0)
    taken = sum(record["steps_taken"] for record in records)
    return {
        "runs": len(records),
        "passed": sum(not record["problems"] for record in records),
        "interrupted": len(recoveries),
        "recovery_p50_s": middle,
        "recovery_p95_s": high,
        "goodput": round(sum(record["steps_useful"] for record in records) / taken, 4) if taken else 0.0,
        "commands": sum(record["commands"] for record in records),
        "longest_hang_s": max((record["hang_s"] for record in records if record["hang_s"] is not None), default=None),
    }


def _run_undisturbed(rig: Rig, workdir: Path, config: JobConfig, ledger: TextIO, console: Console) -> Outcome:
    text, uri = config.model_dump_json(), local_tracking_uri(workdir)
    data = workdir / "data"
    data.mkdir(exist_ok=True)
    (data / "config.json").write_text(text)
    for stage in ("ingest", "tokenize"):
        if rig.issue(stage, data, uri).process.wait(COMMAND_LIMIT_S):
            raise RuntimeError(f"chaos: {stage} failed, see {data / 'command.log'}")
    run = Run(rig, prepare_job(workdir / "undisturbed", text, data / SHARDS), uri)
    run.issue()
    run.finish()
    if run.num_commands > 1:
        raise RuntimeError(f"chaos: the undisturbed run failed, see {run.job_dir / 'command.log'}")
    outcome = read_outcome(run.run_dir, config.pretrain.num_steps)
    problems = find_differences(outcome, outcome, config.pretrain.num_steps)
    problems += check_plan(outcome, data / SHARDS, config.pretrain)
    if problems:
        raise RuntimeError(f"chaos: the undisturbed run is no measure: {'; '.join(problems)}")
    _append(ledger, {"run": "undisturbed", "config": json.loads(text), "hashes": outcome.hashes})
    console.say(f"chaos: the undisturbed run took {len(outcome.lines)} steps, every sample once per epoch")
    return outcome


def _run_disturbed(rig: Rig, workdir: Path, config: JobConfig, fault: Fault, undisturbed: Outcome) -> dict[str, Any]:
    name, uri, num_steps = f"{fault.index:03d}-{fault.kind}", local_tracking_uri(workdir), config.pretrain.num_steps
    text = config.with_overrides([f"publish.experiment=chaos-{name}"]).model_dump_json()
    job_dir = prepare_job(workdir / "runs" / name, text, workdir / "data" / SHARDS)
    server = MlflowServer(uri, workdir / "mlflow.log") if fault.kind == "mlflow" else None
    run = Run(rig, job_dir, server.uri if server else uri, fault.has_own_cluster)
    started = time.monotonic()
    try:
        run.issue()
        hit = strike(run, fault, server)
        run.finish()
    finally:
        if server is not None:
            server.kill()
        rig.clear()
    outcome = read_outcome(run.run_dir, num_steps)
    return {
        "run": fault.index,
        "fault": fault.describe(),
        "strike": asdict(hit),
        "problems": judge(fault, hit, run, outcome, undisturbed, num_steps),
        "commands": run.num_commands,
        "starts": count_starts(outcome.lines),
        "steps_taken": len(outcome.lines),
        "steps_useful": outcome.num_useful,
        "recovery_s": recovery_s(outcome.lines, hit.time_ms),
        "hang_s": hit.hang_s,
        "seconds": round(time.monotonic() - started, 1),
        "hashes": outcome.hashes,
    }


def _append(ledger: TextIO, record: dict[str, Any]) -> None:
    ledger.write(json.dumps(record) + "\n")
    ledger.flush()


def _line(record: dict[str, Any], kills: int) -> str:
    hit, problems = record["strike"], record["problems"]
    verdict = "equal" if not problems else f"FAILED: {'; '.join(problems)}"
    started = ", ".join(map(str, record["starts"]))
    return (
        f"{record['run'] + 1}/{kills} {record['fault']['kind']} at step {hit['step']}: {hit['what']}; "
        f"attempts from step {started}, new steps again after {record['recovery_s']:.1f} s, "
        f"{record['seconds']:.0f} s in all: {verdict}"
    )


def _show(records: list[dict[str, Any]], verdict: dict[str, Any]) -> None:
    table = rich.table.Table("fault", "what it is", "runs", "equal", "recovery p50 / p95", "goodput")
    for kind, meaning in MEANING.items():
        if mine := [record for record in records if record["fault"]["kind"] == kind]:
            _add_row(table, kind, meaning, summarize(mine))
    table.add_section()
    _add_row(table, "all", f"verdict: {verdict['verdict']}", verdict)
    rich.console.Console().print(table)


def _add_row(table: rich.table.Table, kind: str, meaning: str, facts: dict[str, Any]) -> None:
    times = f"{facts['recovery_p50_s']:.1f} s / {facts['recovery_p95_s']:.1f} s" if facts["interrupted"] else "-"
    table.add_row(kind, meaning, str(facts["runs"]), str(facts["passed"]), times, f"{facts['goodput']:.1%}")
