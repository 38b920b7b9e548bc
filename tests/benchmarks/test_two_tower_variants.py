import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.next_item_corpus import build_corpus
from benchmarks.two_tower_findings import Finding, Group, Run, chosen_alpha, findings, read_runs, report
from benchmarks.two_tower_variants import DATASETS, main, parse_arguments, plan_runs
from userrep.data.split import SPLITS
from userrep.training.two_tower_objective import VARIANTS

NUM_ITEMS, NUM_USERS = 40, 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who go from an item to the next one of its category; some items have no brand."""
    directory = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    items = [
        {
            "item_id": f"i{n}",
            "title": f"thing {n} w{n % 4}",
            "categories": ["all", f"c{n % 4}"],
            "brand": "" if n % 5 == 0 else f"b{n % 3}",
        }
        for n in range(NUM_ITEMS)
    ]
    for item in items:
        item["keywords"] = item["title"]
    starts = rng.integers(0, NUM_ITEMS, NUM_USERS)
    events = [
        {"user_id": f"u{user}", "item_id": f"i{(start + 4 * pos) % NUM_ITEMS}", "pos": pos}
        for user, start in enumerate(starts)
        for pos in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(items), directory / "items.parquet")
    pq.write_table(pa.Table.from_pylist(events), directory / "events.parquet")
    return directory


def command(world: Path, runs: Path, *stages: str) -> list[str]:
    sizes = ["--shares", "1", "--steps", "3", "--batch-size", "16", "--seeds", "1"]
    names = ["--variants", "plain", "cfm"]
    return ["--data", str(world), "--runs", str(runs), *sizes, *names, "--stages", *stages]


def test_held_out_pairs_are_neighbours_of_users_who_are_not_trained_on(world: Path, tmp_path: Path) -> None:
    dataset = DATASETS["amazon2014"]
    corpus = build_corpus(dataset.source(world), dataset.configs(4), tmp_path, max_pairs=2, num_shards=2)
    number_of = {key: n for n, key in enumerate(_keys())}
    numbers = np.array([number_of[int(key)] for key in corpus.items.keys])
    for split in SPLITS[1:]:
        pairs = corpus.held_out[split]
        assert ((numbers[pairs.targets] - numbers[pairs.items]) % NUM_ITEMS == 4).all()
    num_users = sum(group["samples"]["train"]["next_item"] for s in corpus.shards.shards for group in s["row_groups"])
    assert num_users + sum(len(pairs) for pairs in corpus.held_out.values()) / 2 == NUM_USERS
    assert corpus.is_head.sum() == NUM_ITEMS // 10
    has_brand = np.diff(corpus.items.features[1].offsets) > 0
    np.testing.assert_array_equal(has_brand, numbers % 5 != 0)


def _keys() -> list[int]:
    from userrep.data.split import id_keys

    return [int(key) for key in id_keys(pa.array([f"i{n}" for n in range(NUM_ITEMS)]))]


def test_stages_build_on_each_other_and_are_not_run_twice(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.jsonl"
    main([*command(world, path, "steps", "alpha", "dropout", "compare")])
    lines = path.read_text().splitlines()
    compared = [run for run in read_runs(path) if run["config"]["stage"] == "compare"]
    assert [run["config"]["variant"] for run in compared] == ["plain", "cfm"]
    assert compared[1]["config"]["loss"]["alpha"] == chosen_alpha(read_runs(path), "amazon2014", 1.0, "cfm")
    for run in compared:
        assert run["test"]["all"]["recall_at_50"] == 1  # of 39 items

    main([*command(world, path, "steps", "alpha", "dropout", "compare")])
    assert path.read_text().splitlines() == lines
    capsys.readouterr()
    main(["--runs", str(path)])
    text = capsys.readouterr().out
    assert "| cfm above plain, 100% of the samples |" in text
    assert text.strip() == report(read_runs(path)).strip()


def test_alpha_comes_before_what_needs_it(tmp_path: Path) -> None:
    arguments = parse_arguments(["--runs", str(tmp_path / "runs"), "--variants", "cfm"])
    with pytest.raises(ValueError, match="run the stage alpha before"):
        list(plan_runs("compare", arguments, []))


def make_run(variant: str, seed: int, share: float, all_: float, head: float, tail: float) -> Run:
    scores = {part: {"recall_at_50": value} for part, value in (("all", all_), ("head", head), ("tail", tail))}
    config = {"stage": "compare", "dataset": "d", "share": share, "variant": variant, "seed": seed}
    return {"config": config, "test": scores}


def test_findings_are_relative_gains_seed_by_seed() -> None:
    runs = []
    for seed, luck in enumerate((0.00, 0.01, 0.02)):
        for share in (1.0, 0.1):
            runs.append(make_run("plain", seed, share, 0.1 + luck, 0.2 + luck, 0.1 + luck))
            lead = 0.011 if share == 1 else 0.022
            runs.append(make_run("cfm", seed, share, 0.1 + luck + lead, 0.2 + luck, 0.1 + luck + lead))
            runs.append(make_run("rfm", seed, share, 0.05 + luck, 0.2, 0.1))
    groups = [Group.of(json.loads(json.dumps(runs)), "d", share) for share in (1.0, 0.1)]
    found = {finding.claim: finding for finding in findings(groups[0], groups[1], "recall_at_50")}
    np.testing.assert_allclose(found["cfm above plain, 100% of the samples"].differences, 0.1)
    np.testing.assert_allclose(found["the gain of cfm is larger with few samples"].differences, 0.1)
    np.testing.assert_allclose(found["the tail gains more than the head, 10% of the samples"].differences, 0.2)
    assert all(finding.line().endswith("| reproduced |") for finding in found.values())


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([0.1, 0.11, 0.1], "reproduced"), ([-0.1, -0.11, -0.1], "the opposite"), ([-1, 0, 1], "not told apart")],
)
def test_a_finding_holds_where_its_interval_is_above_0(differences: list[float], verdict: str) -> None:
    assert Finding("", np.array(differences)).line().endswith(f"| {verdict} |")


def test_variants_are_those_of_the_model(tmp_path: Path) -> None:
    assert parse_arguments(["--runs", str(tmp_path)]).variants == list(VARIANTS)
