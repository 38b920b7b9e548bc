"""Untrained rivals by hand, the choice of settings, and what a run leaves."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.next_item import __main__ as command
from benchmarks.next_item.popularity import POPULARITY
from benchmarks.next_item.system import Outcome, System
from benchmarks.next_item.tf_idf import TF_IDF
from benchmarks.next_item.training import GRID
from benchmarks.next_item.tuning import half_fraction, result, tune
from tests.benchmarks.next_item.planted import make_data_set, planted
from userrep.evaluation.next_item_ranking import NextItemRanks


def ranks(place: int) -> NextItemRanks:
    return NextItemRanks(np.full(4, place - 1), np.ones(4, dtype=np.int64), 50)


def test_popularity_ranks_by_training_counts() -> None:
    data = make_data_set([[0, 0, 1, 2], [0, 1, 2, 1], [3, 3, 1, 0]], list("abcd"))
    # Training: 0 0 / 0 1 / 3 3, so counts are 3, 1, 0, 2.
    outcome = POPULARITY.run(data, {}, 0)
    assert outcome.test.num_higher.tolist() == [3, 2, 0]  # items 2, 1, 0
    assert outcome.validation.num_higher.tolist() == [2, 3, 2]  # items 1, 2, 1


def test_tf_idf_finds_the_item_that_shares_words_with_the_last_one() -> None:
    texts = ["red shoe", "red sock", "blue shoe", "green hat", "green scarf"]
    data = make_data_set([[3, 0, 0, 1], [2, 3, 3, 4]], texts)
    outcome = TF_IDF.run(data, {"max_words": 1, "max_items": 1}, 0)
    # The last item itself is the best; the one that shares a word comes next, beside others that share one.
    assert outcome.test.num_higher.tolist() == [1, 1]
    whole = TF_IDF.run(data, {"max_words": 1, "max_items": 20}, 0)
    assert whole.test.num_higher.tolist() != outcome.test.num_higher.tolist()


def test_validation_chooses_and_the_test_has_no_say() -> None:
    calls = []

    def run(data, settings, seed: int) -> Outcome:
        calls.append((settings["place"], seed))
        return Outcome(ranks(settings["place"]), ranks(1 + seed), {})

    tuned = tune("x", System(({"place": 3}, {"place": 1}, {"place": 2}), run), planted(4), [5, 6, 7], lambda line: None)
    assert calls == [(3, 5), (1, 5), (2, 5), (1, 6), (1, 7)]
    assert tuned.settings == {"place": 1}
    assert list(tuned.outcomes) == [5, 6, 7]
    assert [ndcg for _, ndcg in tuned.grid] == pytest.approx([1 / 2, 1, 1 / np.log2(3)])
    found = result("x", planted(4), tuned)
    assert found["test"]["all"]["mrr"]["mean"] == pytest.approx((1 / 6 + 1 / 7 + 1 / 8) / 3)
    assert found["test"]["cold"]["num_users"] + found["test"]["in_set"]["num_users"] == 4
    assert json.loads(json.dumps(found)) == found


def test_what_has_no_seed_runs_once() -> None:
    tuned = tune("popularity", POPULARITY, planted(4), [0, 1, 2], lambda line: None)
    assert list(tuned.outcomes) == [0]
    assert result("popularity", planted(4), tuned)["test"]["all"]["mrr"]["low"] is None
    with pytest.raises(ValueError, match="no seed"):
        tune("popularity", POPULARITY, planted(4), [], lambda line: None)


def test_half_of_a_grid_holds_every_pair_once() -> None:
    half = half_fraction(GRID)
    for one, other in itertools.combinations(GRID[0], 2):
        pairs = [(settings[one], settings[other]) for settings in half]
        assert len(set(pairs)) == len(pairs) == 4
    with pytest.raises(ValueError, match="has no half"):
        half_fraction(TF_IDF.grid)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_command_ingests_tunes_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    sequences = [["a", "b", "c", "d"], ["b", "c", "d", "a"], ["c", "d"]]
    events = [
        {"user_id": f"u{user}", "item_id": item, "service": "shop", "pos": place}
        for user, items in enumerate(sequences)
        for place, item in enumerate(items)
    ]
    items = [{"item_id": item, "title": f"title of {item}", "brand": "acme"} for item in "abcdz"]
    pq.write_table(pa.Table.from_pylist(events), folder / "events.parquet")
    pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    options = ["--data", str(tmp_path / "data"), "--set", "tiny", "--systems", "popularity", "tf_idf"]
    options += ["--text-columns", "title", "brand", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["next_item", *options, "--users", str(tmp_path / "users.parquet")])
    command.main()
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert [line["system"] for line in lines] == ["popularity", "tf_idf"]
    assert lines[0]["test"]["all"]["num_users"] == 2
    # Training: a b / b c / c d, so the first user's d is a tie of two for the third place, and the other's a too.
    assert lines[0]["test"]["all"]["mrr"]["mean"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    users = pq.read_table(tmp_path / "users.parquet")
    assert users.num_rows == 4
    assert users["mrr"].to_pylist()[:2] == pytest.approx([(1 / 3 + 1 / 4) / 2] * 2)
    assert "popularity" in capsys.readouterr().out
