"""Measures cases alternately in one process, and says PASS or MISSED only where the machine was quiet.

Rules that every benchmark keeps: cases alternate within a round, so that a slow minute hits all of them; a ratio is
taken within a round and its median counts; FLOPs and peak memory are taken in passes of their own, which are not timed;
every line of JSON says by which command, commit, versions and processor it came to be.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MIB = 2**20
MAX_OTHERS = 0.1  # share of the machine that other processes may use before a time says nothing
MIN_UTILISATION = 0.8  # of the threads, by this process
MIN_TIMED_S = 0.3  # a shorter run is repeated within a round: the kernel counts CPU time in hundredths of a second


@dataclass(frozen=True)
class Case:
    """One alternative of a comparison.

    Attributes:
        name: shown in the table and in the JSON lines.
        run: does the work once; called many times.
        units: what one run gets through (users, items, ...), by which times are divided before they are compared.
        flops: of one run, where it was derived from a smaller run; default: counted.
    """

    name: str
    run: Callable[[], Any]
    units: float = 1.0
    flops: float | None = None


@dataclass
class Result:
    """What was measured of a case: one entry of every list per round, each the mean of `repeats` runs.

    Attributes:
        case: what ran.
        flops: of one run, as torch counts matrix products and attention.
        extra_bytes: peak resident memory of a run above what was resident before it.
        repeats: runs per round.
        wall_s: elapsed seconds.
        cpu_s: CPU seconds of all threads of this process.
        others: share of the machine that other processes used meanwhile, 0..1.
        load_average: one-minute load average after the run; holds this process too.
    """

    case: Case
    flops: float
    extra_bytes: int
    repeats: int
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    load_average: list[float] = field(default_factory=list)

    def seconds_per_unit(self) -> list[float]:
        """Wall seconds per unit of every round."""
        return [wall_s / self.case.units for wall_s in self.wall_s]

    def utilisation(self) -> float:
        """CPU seconds per second: the threads that compute, median over rounds."""
        return statistics.median(cpu_s / wall_s for cpu_s, wall_s in zip(self.cpu_s, self.wall_s, strict=True))


def measure(cases: list[Case], rounds: int) -> dict[str, Result]:
    """Runs all cases `rounds` times, each round starting with another one, after one pass for FLOPs and one for memory.

    Returns:
        Results by name, in the order of the cases.
    """
    results = {}
    for case in cases:
        flops = count_flops(case.run)  # also the warm-up, so it runs where the number is known
        started = time.perf_counter()
        extra_bytes = peak_extra_bytes(case.run)
        repeats = max(1, round(MIN_TIMED_S / (time.perf_counter() - started)))
        results[case.name] = Result(case, case.flops or flops, extra_bytes, repeats)
    for turn in range(rounds):
        first = turn % len(cases)
        for case in cases[first:] + cases[:first]:
            _time_round(results[case.name])
    return results


def count_flops(run: Callable[[], Any]) -> float:
    """Floating-point operations of a run: two per multiply-add of matrix products and attention."""
    # torch has no formula for a product that is added in place, nor for its attention kernels on CPU.
    formulas = {
        torch.ops.aten.addmm_: lambda _, one, other, **__: 2 * math.prod(one) * other[1],
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **__: sdpa_flop_count(*shapes[:3]),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **__: (
            sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return float(counter.get_total_flops())


def _time_round(result: Result) -> None:
    gc.collect()
    machine, cpu, wall = _machine_cpu_s(), time.process_time(), time.perf_counter()
    for _ in range(result.repeats):
        result.case.run()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    others_s = max(0.0, _machine_cpu_s() - machine - cpu_s)
    result.wall_s.append(wall_s / result.repeats)
    result.cpu_s.append(cpu_s / result.repeats)
    result.others.append(others_s / (wall_s * (os.cpu_count() or 1)))
    result.load_average.append(os.getloadavg()[0])


def _machine_cpu_s() -> float:
    """CPU seconds that all processes of this machine have used, and that its host has taken from it."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """Peak resident memory of a run above what is resident before it; freed memory is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    except OSError:
        return _sampled_extra_bytes(run)
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) * 1024


def _sampled_extra_bytes(run: Callable[[], Any]) -> int:
    """The same by a thread that looks every 2 ms, where the kernel does not let the peak be reset."""
    process, is_done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        is_done.set()
        thread.join()
    return peak - before


def busy_reason(results: list[Result]) -> str | None:
    """Why times of these results say nothing, or None.

    Low cpu/wall alone is no reason: on a quiet machine it is the case's own doing (page faults, one-thread parts).
    """
    others = max(statistics.median(result.others) for result in results)
    lowest = min(result.utilisation() for result in results)
    wanted = MIN_UTILISATION * torch.get_num_threads()
    if others > MAX_OTHERS or (lowest < wanted and others > MAX_OTHERS / 2):
        return f"other processes used {others:.0%} of the machine, cpu/wall is down to {lowest:.2f}"
    return None


def _row(result: Result, unit: str) -> dict[str, str]:
    times, units = result.seconds_per_unit(), result.case.units
    cpu_s, wall_s = statistics.median(result.cpu_s), statistics.median(result.wall_s)
    return {
        "min ms": f"{1e3 * min(times):,.3f}",
        "median": f"{1e3 * statistics.median(times):,.3f}",
        "CPU ms": f"{1e3 * cpu_s / units:,.3f}",
        "GFLOP": f"{result.flops / units / 1e9:,.3f}",
        f"{unit}s/s": f"{units / wall_s:,.1f}",
        "GFLOP/s": f"{result.flops / wall_s / 1e9:,.1f}",
        "extra MiB": f"{result.extra_bytes / MIB:,.0f}",
        "cpu/wall": f"{result.utilisation():.2f}",
        "others": f"{statistics.median(result.others):.0%}",
    }


class Report:
    """Prints tables and verdicts, and appends a line of JSON for each to a file."""

    def __init__(self, benchmark: str, json_path: Path | None, packages: tuple[str, ...] = ()) -> None:
        """Args: benchmark is the module's name; packages are recorded with their versions besides torch and numpy."""
        self.console, self.json_path = Console(width=max(120, Console().width)), json_path
        self.facts = {"benchmark": benchmark, **environment(benchmark, packages)}
        self.console.print(self.facts)

    def results(self, section: str, results: dict[str, Result], unit: str = "run", **facts: Any) -> None:
        """Shows what was measured; `facts` describe the input."""
        rows = [_row(result, unit) for result in results.values()]
        caption = ", ".join(f"{name}={value}" for name, value in facts.items())
        table = Table("case", title=f"{section}; per {unit}", caption=caption)
        for column in rows[0]:
            table.add_column(column, justify="right")
        for (name, result), row in zip(results.items(), rows, strict=True):
            table.add_row(name, *row.values())
            times = result.seconds_per_unit()
            summary = {"unit": unit, "min_s_per_unit": min(times), "median_s_per_unit": statistics.median(times)}
            measured = {key: value for key, value in vars(result).items() if key != "case"}
            self.line("case", section=section, case=name, units=result.case.units, **summary, **measured, **facts)
        self.console.print(table)

    def speed(self, claim: str, ours: Result, rival: Result, bar: float) -> None:
        """Verdict on how many times faster than the rival, per unit: the median over rounds must reach the bar."""
        self._paired(claim, rival, ours, bar, "at least")

    def time(self, claim: str, ours: Result, rival: Result, bar: float) -> None:
        """Verdict on the time over that of the rival, per unit: the median over rounds must not exceed the bar."""
        self._paired(claim, ours, rival, bar, "at most")

    def _paired(self, claim: str, above: Result, below: Result, bar: float, side: str) -> None:
        above_s, below_s = above.seconds_per_unit(), below.seconds_per_unit()
        ratio = statistics.median(one / other for one, other in zip(above_s, below_s, strict=True))
        of_minima = min(above_s) / min(below_s)
        self.verdict(claim, ratio, bar, side, busy_reason([above, below]), min_over_min=of_minima)

    def verdict(
        self, claim: str, measured: float, bar: float, side: str, no_verdict: str | None = None, **facts: float
    ) -> None:
        """Prints whether a claim holds; `side` is "at least" or "at most", `no_verdict` a reason to withhold it."""
        holds = measured >= bar if side == "at least" else measured <= bar
        outcome = "no verdict" if no_verdict else "PASS" if holds else "MISSED"
        more = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in facts.items())
        more += f" ({no_verdict})" if no_verdict else ""
        self.console.print(f"{outcome}: {claim}: measured {measured:.3f}, bar {side} {bar:g}{more}")
        judged = {"measured": measured, "side": side, "bar": bar, "outcome": outcome, "reason": no_verdict}
        self.line("verdict", claim=claim, **judged, **facts)

    def line(self, kind: str, **facts: Any) -> None:
        """Appends one line of JSON."""
        if self.json_path is not None:
            with self.json_path.open("a") as stream:
                stream.write(json.dumps({"kind": kind, **facts, **self.facts}) + "\n")


def environment(benchmark: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """What a reader needs to repeat a measurement."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("torch", "numpy", *packages)}
    return {
        "command": " ".join(["python -m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "is_dirty": bool(_git("status", "--porcelain")),
        "versions": {"python": platform.python_version(), **versions},
        "processor": names[0].split(":")[1].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="how often each case is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    return parser
