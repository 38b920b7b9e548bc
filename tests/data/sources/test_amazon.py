import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.data.sources.reading import read, write
from userrep.config import ConfigError
from userrep.data.sources.amazon import AmazonSource


def lines(*records: Mapping[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_2014_metadata_are_python_literals(tmp_path: Path):
    metadata = [
        repr({"asin": "B1", "title": "Men's Dryer", "brand": "Wawo", "categories": [["Beauty", "Hair"], ["Tools"]]}),
        json.dumps({"asin": "B2", "title": "Pan", "price": 3.5}),
        repr({"asin": "B3", "price": 1.0, "categories": [[]]}),
        "{'asin': 'B4', 'title': ",
        repr({"title": "no id"}),
        "['asin']",
        r"{'asin': 'B5', 'title': 'C:\d'}",
        "__import__('os').system('true')",
    ]
    write(tmp_path / "meta_Beauty.json.gz", "\n".join(metadata))
    good, faults = read(AmazonSource(path=tmp_path, categories=("Beauty",)), "items")
    assert [(row["item_id"], row["text"], row["line"]) for row in good] == [
        ("B1", "Men's Dryer Wawo Beauty Hair Tools", 1),
        ("B2", "Pan", 2),
        ("B5", r"C:\d", 7),
    ]
    reasons = {3: "empty_text", 4: "broken_line", 5: "missing_id", 6: "broken_line", 8: "broken_line"}
    assert faults == [("meta_Beauty.json.gz", line, reason) for line, reason in reasons.items()]


def test_reviews_of_2014_and_2018_one_service_per_category(tmp_path: Path):
    review = {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1378425600, "reviewText": "ok"}
    write(
        tmp_path / "reviews_Beauty_5.json.gz", lines(review, review | {"unixReviewTime": None}, review | {"asin": None})
    )
    write(tmp_path / "Toys.json", lines(review | {"overall": None}, review | {"overall": "NaN"}) + "{]\n")
    source = AmazonSource(path=tmp_path, categories=("Toys", "Beauty"))
    assert source.services() == ["Toys", "Beauty"]
    good, faults = read(source, "events")
    fields = ("user_id", "item_id", "service", "time", "value", "file", "line")
    assert [tuple(row[name] for name in fields) for row in good] == [
        ("A1", "B1", "Toys", 1378425600, None, "Toys.json", 1),
        ("A1", "B1", "Toys", 1378425600, None, "Toys.json", 2),
        ("A1", "B1", "Beauty", 1378425600, 5.0, "reviews_Beauty_5.json.gz", 1),
    ]
    assert faults == [
        ("Toys.json", 3, "broken_line"),
        ("reviews_Beauty_5.json.gz", 2, "bad_time"),
        ("reviews_Beauty_5.json.gz", 3, "missing_id"),
    ]
    assert source.parts("users") == []


def test_2023_counts_milliseconds_and_parents(tmp_path: Path):
    review = {"user_id": "A1", "asin": "C1", "parent_asin": "P1", "rating": 4.0, "timestamp": 1588687728923}
    planted = [review | {"timestamp": time} for time in ("1588687728923", None, True, -1)]
    write(tmp_path / "All_Beauty.jsonl.gz", lines(review, *planted))
    metadata = {
        "parent_asin": "P1",
        "title": "Dryer",
        "store": "Howard",
        "categories": [],
        "main_category": "All Beauty",
    }
    write(tmp_path / "meta_All_Beauty.jsonl.gz", lines(metadata))
    source = AmazonSource(path=tmp_path, categories=("All_Beauty",))
    good, faults = read(source, "events")
    assert [(row["user_id"], row["item_id"], row["time"], row["value"]) for row in good] == [
        ("A1", "P1", 1588687728, 4.0)
    ]
    assert faults == [("All_Beauty.jsonl.gz", line, "bad_time") for line in (2, 3, 4, 5)]
    assert [row["text"] for row in read(source, "items")[0]] == ["Dryer Howard All Beauty"]
    keeping = source.model_copy(update={"keep_attributes": True})
    assert [row["text"] for row in read(keeping, "items")[0]] == ["title\tDryer\nbrand\tHoward\ncategories\tAll Beauty"]


def test_files_are_one_per_category(tmp_path: Path):
    source = AmazonSource(path=tmp_path, categories=("Beauty",))
    with pytest.raises(ConfigError, match=r"category 'Beauty' has in .* none of reviews_Beauty\.json"):
        source.parts("events")
    write(tmp_path / "reviews_Beauty.json", "")
    write(tmp_path / "reviews_Beauty_5.json.gz", "")
    with pytest.raises(ConfigError, match=r"reviews_Beauty\.json, reviews_Beauty_5\.json\.gz: one file is needed"):
        source.parts("events")
    chosen = AmazonSource(path=tmp_path, categories=("Beauty",), reviews="reviews_{0}_5.json")
    assert len(chosen.parts("events")) == 1
