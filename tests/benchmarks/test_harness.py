import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import MIB, Case, Report, Result, count_flops, measure, peak_extra_bytes
from benchmarks.item_encoder import ideal_flops
from userrep.models.clue import ClueConfig


def result(name: str, wall_s: list[float], units: float = 1.0, others: float = 0.0) -> Result:
    """A result of a machine on which every thread of this process computes."""
    threads = torch.get_num_threads()
    cpu_s = [threads * value for value in wall_s]
    return Result(Case(name, lambda: None, units), 1.0, 0, 1, wall_s, cpu_s, [others] * len(wall_s), [0.0])


def test_flops_of_products_in_place_and_of_attention_on_cpu() -> None:
    one, other, total = torch.randn(3, 4), torch.randn(4, 5), torch.zeros(3, 5)
    assert count_flops(lambda: one @ other) == 2 * 3 * 4 * 5
    assert count_flops(lambda: total.addmm_(one, other)) == 2 * 3 * 4 * 5
    query = torch.randn(2, 3, 7, 16, requires_grad=True)
    product = 2 * 2 * 3 * 7 * 7 * 16
    assert count_flops(lambda: F.scaled_dot_product_attention(query, query, query)) == 2 * product
    # The backward pass computes the scores again, then four gradients.
    assert count_flops(lambda: F.scaled_dot_product_attention(query, query, query).sum().backward()) == 7 * product


def test_ideal_flops_are_those_of_one_layer_written_out() -> None:
    config = ClueConfig(dim=8, item_layers=1, num_heads=2, mlp_ratio=4)
    length = 5
    matrices = 2 * length * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)
    attention = 2 * (2 * length * length * 8)
    assert ideal_flops(config, np.array([length])) == 3 * (matrices + attention)


def test_peak_memory_is_that_of_the_run_alone() -> None:
    kept = torch.ones(50 * MIB // 4)
    peak = peak_extra_bytes(lambda: torch.ones(200 * MIB // 4).sum() + kept[0])
    assert 195 * MIB < peak < 230 * MIB


def test_every_case_runs_in_every_round_and_short_runs_are_repeated() -> None:
    calls = []
    cases = [Case("short", lambda: calls.append("short"), units=2.0), Case("long", lambda: time.sleep(0.4))]
    results = measure(cases, rounds=3)
    assert list(results) == ["short", "long"]
    assert len(results["short"].wall_s) == len(results["long"].wall_s) == 3
    assert results["long"].repeats == 1
    assert len(calls) == 2 + 3 * results["short"].repeats  # two passes for FLOPs and memory
    assert results["short"].seconds_per_unit()[0] == results["short"].wall_s[0] / 2


@pytest.mark.parametrize(("bar", "outcome"), [(2.0, "PASS"), (2.5, "MISSED")])
def test_speed_is_compared_per_unit_within_rounds(tmp_path: Path, bar: float, outcome: str) -> None:
    path = tmp_path / "out.jsonl"
    ours, rival = result("ours", [2.0, 4.0, 2.0], units=4.0), result("rival", [1.0, 2.0, 5.0])
    Report("harness", path).speed("claim", ours, rival, bar)
    line = json.loads(path.read_text())
    assert (line["measured"], line["min_over_min"], line["outcome"]) == (2.0, 2.0, outcome)
    assert {"commit", "is_dirty", "command", "versions", "processor", "cores", "threads", "date"} <= set(line)


def test_a_busy_machine_gives_no_verdict(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    report = Report("harness", path)
    quiet, busy = result("ours", [1.0, 1.0]), result("rival", [2.0, 2.0], others=0.5)
    report.time("claim", quiet, busy, 1.0)
    idle = result("idle", [2.0, 2.0])
    idle.cpu_s = [value / 2 for value in idle.cpu_s]
    report.time("claim", quiet, idle, 1.0)  # nobody else was there: it leaves its core idle by itself
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["no verdict", "PASS"]
    assert "other processes used 50%" in lines[0]["reason"]
