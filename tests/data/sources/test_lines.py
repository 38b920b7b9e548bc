import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.sources.reading import write
from userrep.config import ConfigError
from userrep.data.sources import lines
from userrep.data.sources.lines import Encoding, data_file, first_line, read_lines, spans


def read(path: Path, encoding: Encoding = "utf-8") -> tuple[list[tuple[int, str]], list[tuple[int, str, str]]]:
    good, bad = [], []
    for span in spans(path, path.name):
        for batch in read_lines(span, encoding):
            good += zip(batch.numbers, batch.texts, strict=True)
            bad += [(entry.line, entry.reason, entry.record) for entry in batch.spoiled]
    return good, bad


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=150, deadline=None
)
@given(
    rows=st.lists(
        st.sampled_from([b"", b"abc", b"x" * 30, "\xe9\u20ac".encode(), b"\xff\xfe", b"  ", b"a\x85b", b"cr\r"])
    ),
    has_end=st.booleans(),
    span_bytes=st.integers(1, 80),
    block_bytes=st.integers(1, 40),
)
def test_every_line_comes_once_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[bytes], has_end: bool, span_bytes: int, block_bytes: int
):
    monkeypatch.setattr(lines, "SPAN_BYTES", span_bytes)
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path / "file.txt", b"\n".join(rows) + (b"\n" if has_end else b""))
    good, bad = read(path)
    expected_good, expected_bad = [], []
    for number, row in enumerate(rows, start=1):
        try:
            text = row.decode().removesuffix("\r")
        except UnicodeDecodeError:
            expected_bad.append((number, "bad_encoding", row.decode(errors="backslashreplace")))
            continue
        if text.strip():
            expected_good.append((number, text))
    assert good == expected_good
    assert bad == expected_bad


def test_spans_divide_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lines, "SPAN_BYTES", 100)
    path = write(tmp_path / "file.txt", "".join(f"line {number}\n" for number in range(1, 201)))
    found = spans(path, "file.txt")
    assert len(found) > 10
    assert read(path)[0] == [(number, f"line {number}") for number in range(1, 201)]
    # A compressed file cannot be entered in its middle.
    assert len(spans(write(tmp_path / "file.txt.gz", path.read_bytes()), "file.txt.gz")) == 1


def test_an_over_long_line_is_one_broken_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 16)
    path = write(tmp_path / "file.txt", "before\n" + "x" * 1000 + "\n" + "y" * 50 + "\nafter")
    good, bad = read(path)
    assert good == [(1, "before"), (3, "y" * 50), (4, "after")]
    assert bad == [(2, "broken_line", "x" * 51)]


def test_byte_order_mark_is_no_text(tmp_path: Path):
    path = write(tmp_path / "file.txt", b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert read(path)[0] == [(1, "first"), (2, "second")]
    assert first_line(path, "utf-8") == "first"


def test_latin_1(tmp_path: Path):
    path = write(tmp_path / "file.txt", "Mis\xe9rables\n", "latin-1")
    assert read(path, "latin-1")[0] == [(1, "Mis\xe9rables")]
    assert read(path)[1] == [(1, "bad_encoding", "Mis\\xe9rables")]
    with pytest.raises(ConfigError, match=r"line 1 of .* is not utf-8"):
        first_line(path, "utf-8")


def test_gzip_reads_like_plain(tmp_path: Path):
    content = "".join(f"line {number}\n" for number in range(5000))
    assert read(write(tmp_path / "a.txt", content)) == read(write(tmp_path / "a.txt.gz", content))
    assert data_file(tmp_path, "a.txt") == tmp_path / "a.txt"
    (tmp_path / "a.txt").unlink()
    assert data_file(tmp_path, "a.txt") == tmp_path / "a.txt.gz"
    assert data_file(tmp_path, "b.txt") is None


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_gzip_is_an_error_not_a_short_file(tmp_path: Path, damage: str):
    data = gzip.compress("".join(f"line {number}\n" for number in range(5000)).encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data[:-100] if damage == "cut" else b"no gzip at all\n")
    with pytest.raises(ConfigError, match=r"a\.txt\.gz is damaged"):
        read(path)


def test_empty_file(tmp_path: Path):
    assert read(write(tmp_path / "a.txt", b"")) == ([], [])
    assert first_line(tmp_path / "a.txt", "utf-8") == ""
