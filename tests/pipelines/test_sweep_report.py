"""The page of a sweep: every number of `fit.json` that may be stated, nothing that may not, and no other file."""

import re
from html import unescape
from pathlib import Path

import pytest

from pipelines.sweep_report import summary_text, write_sweep_report
from pipelines.sweep_tables import number
from tests.support.runs_table import NUM_RESAMPLES, star_laws, star_runs, take
from userrep.scaling.answers import answer_questions
from userrep.scaling.records import Laws


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    earlier = directory / "earlier.json"
    star_laws(2).save(earlier)
    write_sweep_report(star_runs(), directory, "A <star>", earlier, num_resamples=NUM_RESAMPLES)
    return directory


def text_of(page: Path) -> str:
    html = page.read_text(encoding="utf-8")
    words = re.sub(r"<(style|svg)\b.*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(words))


def test_the_page_has_the_numbers_of_the_file(sweep: Path) -> None:
    laws, text = Laws.load(sweep / "fit.json"), text_of(sweep / "report.html")
    assert laws == star_laws()
    for law in laws.laws:
        for form in law.fits:
            assert f"{form.r_squared:.4f}" in text
            for estimate in form.estimates:
                ends = f"{number(estimate.value)} {number(estimate.low)} to {number(estimate.high)}"
                assert (ends in text) == estimate.is_stated
                assert all(reason in text for reason in estimate.refusals)
        for one in law.forecasts:
            assert f"{number(one.measured)} {number(one.predicted)} {number(one.low)} to {number(one.high)}" in text
        for residual in law.residuals:
            assert f"{100 * residual.log_residual:+.2f}%" in text
    assert all(answer.text in text for answer in answer_questions(laws))
    assert "27 finished, 1 failed, 1 planned" in text
    assert "out of memory at step 12" in text
    assert "Drift against planted" in text


def test_the_page_needs_no_other_file_and_escapes_names(sweep: Path) -> None:
    html = (sweep / "report.html").read_text(encoding="utf-8")
    assert "A &lt;star&gt;" in html
    assert "A <star>" not in html
    assert html.count("<svg ") == 4
    assert not re.search(r"<(script|link|img)\b|@import|url\((?!#)", html)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_figures_are_files_too_and_old_ones_go(sweep: Path, tmp_path: Path) -> None:
    names = {"loss_compute", "factors", "downstream", "exponents"}
    found = {path.name for path in (sweep / "figures").iterdir()}
    assert found == {f"{name}.{ending}" for name in names for ending in ("svg", "png")}
    assert all((sweep / "figures" / name).stat().st_size > 1000 for name in found)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "isoflop.svg").touch()
    (tmp_path / "figures" / "mine.svg").touch()
    write_sweep_report(take(star_runs(), 1), tmp_path, "one", num_resamples=NUM_RESAMPLES)
    assert {path.name for path in (tmp_path / "figures").glob("*.svg")} == {"loss_compute.svg", "mine.svg"}


@pytest.mark.parametrize("num_finished", [0, 3, 6])
def test_a_small_sweep_makes_a_page_of_what_cannot_be_said(num_finished: int, tmp_path: Path) -> None:
    earlier = tmp_path / "fit.json"  # the file that is replaced
    star_laws().save(earlier)
    laws = write_sweep_report(take(star_runs(), num_finished), tmp_path, "small", earlier, num_resamples=NUM_RESAMPLES)
    text = text_of(tmp_path / "report.html")
    assert text.count("Cannot be said, because") >= (5 if num_finished == 6 else 7)
    for law in laws.laws:
        if law.refusal is not None:
            assert f"{law.name} is not fitted: {law.refusal}." in text
    assert "Drift against planted" in text
    assert "Infinity" not in text
    assert "nan" not in text.split()


def test_an_earlier_file_that_is_none_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not the fit\.json of a sweep"):
        write_sweep_report(star_runs(), tmp_path / "new", "again", tmp_path / "bad.json")
    assert not (tmp_path / "new").exists()


def test_the_summary_has_the_stated_exponents_and_all_answers() -> None:
    text = summary_text(star_laws())
    assert text.startswith("planted: 27 cells finished, 1 failed, 1 planned; 3.6 decades of compute")
    for law in star_laws().laws:
        for estimate in law.with_floor.estimates:
            if "exponent" in estimate.name:
                assert (str(estimate) in text) == estimate.is_stated
    assert all(answer.text in text for answer in answer_questions(star_laws()))
    assert "Next cell for L(N, D)" in text
