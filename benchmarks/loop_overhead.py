"""What the training loop costs: `python -m benchmarks.loop_overhead [--shards DIR] [--users N] [--json FILE]`.

The real loop (plan, stream, checkpoints, ledger, metrics, MLflow) against a bare PyTorch loop over the same batches,
which lie in its memory: same model, same threads, in alternating processes of one Ray cluster. Claim: from step to step
the real loop takes at most 1.1 times as long. Then what a checkpoint costs the step after which it is taken: written by
the step, and behind the steps. Without `--shards`, a table of the demo's synthetic users is made first.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from rich.table import Table

from benchmarks.harness import MAX_OTHERS, Report
from benchmarks.input_pipeline import CORES, HARD, CpuMonitor, make_shards, two_cores
from userrep.data.views import ViewConfig
from userrep.models.clue import ClueConfig
from userrep.training.checkpoint_writer import CheckpointWriter
from userrep.training.fence import start_attempt, take_over
from userrep.training.follower import Follower
from userrep.training.launch import train
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, set_learning_rates
from userrep.training.run_record import RunRecord
from userrep.training.settings import CluePretraining, WorkersConfig, open_training_stream
from userrep.training.systems import build_state
from userrep.training.tracking import SPOOL_NAME, SpoolReader

MAX_OVERHEAD = 1.1  # time from step to step, over that of the bare loop
WARM_UP_STEPS = 3
STALLS = 5  # checkpoints of each kind


def bare_loop(shards: Path, config: CluePretraining, threads: int) -> list[tuple[float, float]]:
    """What one would write without this package, on batches that are there already: start and end of every step."""
    torch.set_num_threads(threads)
    batches = list(open_training_stream(shards, config).batches())
    state = build_state(config, shards)
    objective, times = ClueObjective(state.model, loss=config.loss), []
    for step, batch in enumerate(batches):
        started = time.time()
        set_learning_rates(state.optimizer, step, config.num_steps, config.optim)
        loss, _ = objective(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.max_grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        times.append((started, time.time()))
    return times


def measure_bare(config: CluePretraining, shards: Path, threads: int) -> dict[str, Any]:
    """Seconds per step of the bare loop after its warm-up."""
    with CpuMonitor() as monitor:
        times = ray.get(ray.remote(num_cpus=1)(bare_loop).remote(shards, config, threads))
        time.sleep(1)  # for one more sample
    start, stop = times[WARM_UP_STEPS][0], times[-1][1]
    return {"step_s": (stop - start) / (len(times) - WARM_UP_STEPS), "others": _others(monitor, start, stop)}


def measure_real(config: CluePretraining, shards: Path, run_dir: Path, threads: int) -> dict[str, Any]:
    """Seconds from step to step of the real loop after its warm-up, and what they are made of.

    Returns:
        `step_s`; of it `input_wait_s`, `compute_s`, and `record_s` for ledger, metrics and checkpoints; `checkpoints`,
        how many steps have taken one.
    """
    run_dir.mkdir()
    RunRecord(experiment="loop_overhead", config=config.model_dump(mode="json")).write(run_dir)
    follower = Follower(run_dir, f"sqlite:///{run_dir / 'mlflow.db'}")
    with CpuMonitor() as monitor:
        train(shards, run_dir, config, WorkersConfig(num_workers=1, threads=threads))
    if (reason := follower.finish("FINISHED")) is not None:
        raise RuntimeError(f"MLflow does not have the metrics: {reason}")
    points = SpoolReader(run_dir / SPOOL_NAME).read()[WARM_UP_STEPS - 1 : -1]  # the last step ends with a validation
    start, stop = points[0]["time_ms"] / 1e3, points[-1]["time_ms"] / 1e3
    metrics = [point["metrics"] for point in points[1:]]
    step_s = (stop - start) / len(metrics)
    wait_s, compute_s = (statistics.mean(m[f"time/{name}"] for m in metrics) for name in ("input_wait_s", "step_s"))
    return {
        "step_s": step_s,
        "input_wait_s": wait_s,
        "compute_s": compute_s,
        "record_s": step_s - wait_s - compute_s,
        "checkpoints": sum("time/checkpoint_stall_s" in m for m in metrics),
        "others": _others(monitor, start, stop),
    }


def _others(monitor: CpuMonitor, start: float, stop: float) -> float:
    """Share of the cores that processes outside this benchmark used meanwhile."""
    tree_s, machine_s = monitor.between(start, stop)
    return max(0.0, machine_s - tree_s) / (CORES * (stop - start))


def compare_loops(
    report: Report, arguments: argparse.Namespace, config: CluePretraining, shards: Path, directory: Path
) -> None:
    """Alternating runs of both loops, and the verdict."""
    table = Table(title=f"{config.global_batch_size} users, D={config.model.dim}, {arguments.threads} threads: ms")
    for column in ("round", "bare step", "real step", "input wait", "compute", "record", "checkpoints", "ratio"):
        table.add_column(column, justify="right")
    ratios, others = [], []
    for turn in range(arguments.rounds):
        runs: dict[str, dict[str, Any]] = {}
        for name in ("bare", "real") if turn % 2 == 0 else ("real", "bare"):
            if name == "bare":
                runs[name] = measure_bare(config, shards, arguments.threads)
            else:
                runs[name] = measure_real(config, shards, directory / f"run-{turn}", arguments.threads)
            report.line("loop", round=turn, case=name, **runs[name])
        bare, real = runs["bare"], runs["real"]
        ratios.append(real["step_s"] / bare["step_s"])
        others += [bare["others"], real["others"]]
        parts = [real[name] for name in ("step_s", "input_wait_s", "compute_s", "record_s")]
        shown = [f"{1e3 * seconds:,.1f}" for seconds in (bare["step_s"], *parts)]
        table.add_row(str(turn), *shown, str(real["checkpoints"]), f"{ratios[-1]:.3f}")
    report.console.print(table)
    reason = f"other processes used {max(others):.0%} of two cores" if max(others) > MAX_OTHERS else None
    claim = "time from step to step of the real loop over a bare one"
    report.verdict(
        claim, statistics.median(ratios), MAX_OVERHEAD, "at most", reason, lowest=min(ratios), highest=max(ratios)
    )


def compare_checkpoints(report: Report, config: CluePretraining, shards: Path, directory: Path) -> None:
    """How long a step stands still for a checkpoint that it writes, and for one that is written behind it."""
    state = build_state(config, shards)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # now the optimizer has its state
    take_over(directory, "benchmark")
    attempt = start_attempt(directory, "benchmark", lambda: None)
    writer = CheckpointWriter(directory / "checkpoints", {}, 1, attempt, lambda: None)
    stalls: dict[str, list[float]] = {"by the step": [], "behind the steps": []}
    for state.step, name in enumerate(itertools.islice(itertools.cycle(stalls), 2 * STALLS + 2)):
        started = time.perf_counter()
        writer.save(state, {})
        if name == "by the step":
            writer.wait()
        stalls[name].append(time.perf_counter() - started)
        writer.wait()
    writer.close()
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    for name, seconds in stalls.items():
        median = statistics.median(seconds[1:])  # the first one also gets the memory for the copy
        report.console.print(f"a checkpoint of {num_parameters:,} parameters, {name}: {1e3 * median:,.1f} ms")
        report.line("checkpoint", case=name, num_parameters=num_parameters, stall_s=seconds[1:])


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, help="tokenized table of a job; default: synthetic users")
    parser.add_argument("--users", type=int, default=8_000, help="synthetic")
    parser.add_argument("--batch-size", type=int, default=512, help="users of a global batch")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2, help="of each transformer")
    parser.add_argument("--steps", type=int, default=40, help=f"of a run, at least {WARM_UP_STEPS + 3}")
    parser.add_argument("--threads", type=int, default=CORES, help="of torch, in both loops")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind; their order alternates")
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    arguments = parser.parse_args()
    if arguments.steps < WARM_UP_STEPS + 3:
        parser.error(f"--steps {arguments.steps} leaves nothing to measure: take at least {WARM_UP_STEPS + 3}")
    return arguments


def main() -> None:
    """Runs the measurements and prints them."""
    arguments = parse_arguments()
    report = Report("loop_overhead", arguments.json, ("ray", "pyarrow"))
    config = CluePretraining(
        model=ClueConfig(
            dim=arguments.dim, item_layers=arguments.layers, service_layers=arguments.layers, num_heads=4, mlp_ratio=4
        ),
        views=ViewConfig(kinds=("service",)),
        augment=HARD,
        optim=OptimConfig(bag_steps=0),
        global_batch_size=arguments.batch_size,
        num_steps=arguments.steps,
        validate_every=arguments.steps,
        pool_size=64,
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shards = arguments.shards.resolve() if arguments.shards else make_shards(arguments.users, directory / "job")
        with two_cores():
            compare_loops(report, arguments, config, shards, directory)
        compare_checkpoints(report, config, shards, directory / "checkpoint")


if __name__ == "__main__":
    main()
