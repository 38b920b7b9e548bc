"""The report is one page that stands alone: the numbers are on it, no name can break it, and parts may be missing."""

import copy
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import matplotlib
import pytest

from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.job import Job
from pipelines.report import format_seconds, write_report
from pipelines.verdict import compare_systems, format_share
from userrep.manifest import Manifest, write_manifest

VOID_TAGS = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = "<script>alert('$x$')</script>&\"'"


def metrics(value: float, low: float, high: float) -> dict[str, float]:
    """Of a system whose lead over or under the encoder of SUMMARY is as clear as the two intervals make it."""
    own = {"recall_at_1": value / 2, "recall_at_10": value, "recall_at_10_low": low, "recall_at_10_high": high}
    return own | {"lead_low": 0.40 - high, "lead_high": 0.46 - low}


SUMMARY: dict[str, Any] = {
    "config": "demo",
    "seconds": 4321.0,
    "peak_rss_bytes": 5 * 2**30,
    "driver_peak_rss_bytes": 2**29,
    "stages": {
        "ingest": {"seconds": 12.34, "rows": 71171, "skipped": True},
        "pretrain": {"seconds": 754.0, "rows": 2560, "skipped": False},
    },
    "data": {
        "users": 1500,
        "events": 71171,
        "items": 40123,
        "services": ["search", "shop"],
        "rejected": {"events": 17, "items": 0, "users": 3},
        "duplicates": 1234,
        "tokens_per_item": 6.47,
    },
    "pretrain": {
        "steps": 40,
        "samples_seen": 20480,
        "users_per_s": 1686.5,
        "input_wait_fraction": 0.0146,
        "val_loss": 4.6254,
        "best_step": 30,
        "batch_hash": "7da90d7b",
        "parameters": {"embedding": 17152, "non_embedding": 6561, "total": 23713},
        "pool": 2000,
        "views": "the later half",
        **metrics(0.432, 0.401, 0.463),
    },
    "baselines": {
        "random": metrics(0.005, 0.003, 0.008),
        "tfidf": metrics(0.35, 0.32, 0.38),
        "bag_of_tokens": metrics(0.41, 0.38, 0.44),
        "oracle": metrics(0.9, 0.88, 0.92),
    },
    "tasks": {
        "order": ["universal", "gender"],
        "kinds": ["vector", "label"],
        "metrics": ["recall_at_10", "accuracy"],
        "matrix": [[0.8125, None], [0.7313, 0.6471]],
        "backward_transfer": [-10.0, None],
        "popularity": [None, 0.5123],
    },
    "table": {
        "name": "user_embeddings",
        "version": 3,
        "alias": "champion",
        "rows": 1500,
        "dim": 16,
        "dtype": "float32",
        "sha256": "18a0" * 16,
    },
    "pull": {"verified": True, "seconds": 0.026, "directory": "pulled"},
    "environment": {"python": "3.11.7", "cores": 2, "load_average_1m": 1.0, "torch": "2.13.0"},
}


def curve(num_steps: int = 40, validate_every: int = 10) -> list[dict[str, Any]]:
    points = []
    for step in range(1, num_steps + 1):
        point = {"train/loss": 5 + math.exp(-step), "time/step_s": 0.1, "time/input_wait_s": 0.01}
        if step % validate_every == 0:
            point |= {"val/loss": 5.5 - step / 100, "val/recall_at_10": step / 100}
        points.append({"step": step, "metrics": point})
    return points


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Job(JobConfig(name="demo"), tmp_path, Console())


@pytest.fixture(scope="module")
def full_html(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return render(Job(JobConfig(name="demo"), tmp_path_factory.mktemp("full"), Console()), SUMMARY, curve())


def render(job: Job, summary: dict[str, Any], points: list[dict[str, Any]] | None = None) -> str:
    if points is not None:
        job.path("encoder").mkdir()
        facts = {"curve": points, "run_name": "run-0815"}
        write_manifest(job.path("encoder"), Manifest(table="encoder", stage="pretrain", config={}, facts=facts))
    write_report(job, summary)
    return (job.workdir / "report.html").read_text(encoding="utf-8")


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in copy.deepcopy(SUMMARY).items() if name not in names}


FIGURELESS = without("stages", "pretrain", "baselines")  # quick to render


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and whether every tag is closed by its own end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def figures(self) -> list[str]:
        return [attributes["aria-label"] or "" for tag, attributes in self.tags if tag == "svg"]


def test_page_shows_the_numbers(full_html):
    page = Page(full_html)
    expected = [
        "Not clearly above bag of tokens",
        "recall@10 .432 [.401, .463]: above TF-IDF (.350) and random (.005); not clearly above bag of tokens (.410)",
        "71,171",
        "40,123",
        "1,234",
        "1 h 12 min",
        "5.00 GiB",
        "0.50 GiB",
        "1.5%",
        "12.3 s, skipped",
        "12 min 34 s",
        "chance .005",
        "run-0815",
        "18a0" * 16,
        "userrep pull user_embeddings@champion --to user_embeddings --tracking-uri sqlite:///",
        "userrep pull user_embeddings@v3",
        "global_batch_size: 512",
    ]
    assert [text for text in expected if text not in page.text] == []
    assert len(page.figures()) == 4
    assert all(page.figures())
    assert ("details", {}) in page.tags


def test_page_stands_alone(full_html):
    page = Page(full_html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    links = [v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
    assert all(link is not None and link.startswith("#") for link in links)
    assert set(re.findall(r"url\((.)", full_html)) <= {"#"}
    assert "@import" not in full_html


def test_ids_are_unique_and_references_resolve(full_html):
    ids = [attributes["id"] for _, attributes in Page(full_html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', full_html))
    assert references
    assert references <= set(ids)


def test_hostile_names_are_text(job):
    summary = copy.deepcopy(SUMMARY)
    summary["config"] = summary["table"]["name"] = summary["table"]["alias"] = summary["pretrain"]["views"] = HOSTILE
    summary["data"]["services"] = [HOSTILE]
    summary["data"]["rejected"] = {HOSTILE: 1}
    summary["baselines"][HOSTILE] = metrics(0.2, 0.1, 0.3)
    summary["stages"][HOSTILE] = {"seconds": 1.0, "rows": 1, "skipped": False}
    html = render(job, summary, curve())
    page = Page(html)
    assert "<script" not in html
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(HOSTILE) >= 6
    assert any(HOSTILE in label for label in page.figures())


@pytest.mark.parametrize(
    "missing",
    [
        ("baselines", "stages"),
        ("pretrain", "stages"),
        ("pretrain", "baselines"),
        ("pretrain", "stages", "pull"),
        ("pretrain", "stages", "table", "pull"),
        ("pretrain", "stages", "data", "environment"),
        tuple(SUMMARY),
    ],
)
def test_parts_may_be_missing(job, missing):
    page = Page(render(job, without(*missing)))
    assert "demo" in page.text
    assert "Undefined" not in page.text


@pytest.mark.parametrize("names", [("oracle",), ("bag_of_tokens",), ("oracle", "bag_of_tokens", "random", "tfidf")])
def test_baselines_may_be_missing(job, names):
    summary = copy.deepcopy(SUMMARY)
    for name in names:
        del summary["baselines"][name]
    del summary["stages"]
    text = Page(render(job, summary)).text
    assert ("ceiling" in text) == ("oracle" in summary["baselines"])
    assert ("bag of tokens" in text) == ("bag_of_tokens" in summary["baselines"])


@pytest.mark.parametrize("points", [[], curve(1), curve(3, validate_every=9), curve(5000, validate_every=500)])
def test_any_length_of_curve(job, points):
    html = render(job, FIGURELESS, points)
    assert len(Page(html).figures()) == (2 if points else 0)
    assert len(html) < 300_000


def test_all_stages_skipped(job):
    summary = without("pretrain", "baselines")
    for stage in summary["stages"].values():
        stage |= {"skipped": True, "seconds": 0.0}
    assert Page(render(job, summary)).text.count("0.00 s, skipped") == 2


def test_a_table_that_was_not_verified_is_called_so(job):
    assert "Not verified" not in Page(render(job, FIGURELESS)).text
    assert "Not verified" in Page(render(job, {**FIGURELESS, "pull": {"verified": False, "seconds": 1.0}})).text


def test_busy_machine_is_named(job):
    assert "lower bound" not in Page(render(job, FIGURELESS)).text
    busy = {**FIGURELESS, "environment": {"cores": 2, "load_average_1m": 16.8}}
    assert "16.8 on 2 cores" in Page(render(job, busy)).text


def test_password_of_the_tracking_server_stays_out(job, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:first-secret@mlflow.example:5000/base?token=other-secret")
    html = unescape(render(job, FIGURELESS))
    assert "--tracking-uri https://mlflow.example:5000/base\n" in html.replace("</code>", "\n")
    assert "secret" not in html


def test_same_input_same_page_and_nothing_else_changes(job, full_html):
    style = dict(matplotlib.rcParams)
    again = render(job, json.loads(json.dumps(SUMMARY)), curve())
    changing = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC|sqlite:\S+")
    assert changing.sub("", full_html) == changing.sub("", again)
    assert dict(matplotlib.rcParams) == style
    assert sorted(path.name for path in job.workdir.iterdir()) == ["encoder", "report.html"]


def test_failure_leaves_the_old_page(job):
    old = render(job, FIGURELESS)
    with pytest.raises(KeyError):
        write_report(job, {**FIGURELESS, "table": {"name": "incomplete"}})
    assert (job.workdir / "report.html").read_text(encoding="utf-8") == old


@pytest.mark.parametrize(
    ("rivals", "headline", "sentence"),
    [
        ({"tfidf": (0.3, 0.35)}, "Above every baseline", "above TF-IDF (.325)."),
        ({"tfidf": (0.3, 0.40)}, "Not clearly above any baseline", "not clearly above TF-IDF (.350); "),
        (
            {"tfidf": (0.3, 0.5), "random": (0, 0.1)},
            "Not clearly above TF-IDF",
            "above random (.050); not clearly above",
        ),
        ({"tfidf": (0.47, 0.5), "random": (0, 0.1)}, "Below TF-IDF", "above random (.050); below TF-IDF (.485)."),
        (
            {"a": (0.1, 0.2), "b_c": (0.2, 0.3), "d": (0, 0)},
            "Above every baseline",
            "above b c (.250), a (.150) and d (.000).",
        ),
        ({"oracle": (0.8, 0.9)}, "No baseline to compare with", "no baseline was evaluated."),
        ({}, "No baseline to compare with", "no baseline was evaluated."),
    ],
)
def test_verdict(rivals, headline, sentence):
    systems = {name: metrics((low + high) / 2, low, high) for name, (low, high) in rivals.items()}
    actual, text = compare_systems({"encoder": metrics(0.43, 0.40, 0.46), **systems})
    assert actual == headline
    assert text.startswith(f"recall@10 .430 [.400, .460]: {sentence}")


def test_verdict_without_results():
    assert compare_systems({})[0] == "Not evaluated"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.026, "0.03 s"), (5.44, "5.4 s"), (60, "1 min 0 s"), (125.4, "2 min 5 s"), (90061, "25 h 1 min")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, ".000"), (0.4321, ".432"), (1.0, "1.000"), (-0.5, "-0.500")])
def test_shares(value, text):
    assert format_share(value) == text


def test_tasks_are_shown_with_what_was_forgotten(full_html: str) -> None:
    section = full_html[full_html.index('id="tasks-title"') :]
    section = section[: section.index("</section>")]
    for text in ("pretraining", "gender", "recall at 10", "0.8125", "0.7313", "0.6471", "-10.0%", "0.5123"):
        assert text in section, text
    assert "None" not in section


def test_the_encoder_before_the_tasks_is_no_rival() -> None:
    before = metrics(0.5, 0.45, 0.55) | {"lead_low": -0.2, "lead_high": -0.1}
    systems = {"encoder": metrics(0.432, 0.401, 0.463), "pretrained": before}
    headline, text = compare_systems(systems)
    assert headline == "No baseline to compare with"
    assert "before the tasks it was .500" in text
