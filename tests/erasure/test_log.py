"""The log names nobody, only its owner can read its key, and a half-written line harms nothing."""

import re
from pathlib import Path

import pytest

from userrep.erasure.log import ErasureLog, read_log


def test_no_id_is_in_the_log_and_the_key_is_private(tmp_path: Path) -> None:
    log = ErasureLog(tmp_path / "erasure", ["alice@example.com", "bob"])
    log.append("erased", table="embeddings", files=[["part-00000.parquet", "a", "b"]])
    again = ErasureLog(tmp_path / "erasure", ["bob"])
    again.append("proved")
    text = log.path.read_text()
    assert "alice" not in text
    assert "bob" not in text
    assert (tmp_path / "erasure" / "key").stat().st_mode & 0o777 == 0o600
    first, second = read_log(log.path)
    assert second["users"] == [first["users"][1]] == [log.pseudonym("bob")]  # whoever has the key can ask
    assert (first["event"], first["table"], second["event"]) == ("erased", "embeddings", "proved")
    assert re.fullmatch(r"[0-9a-f]{64}", log.pseudonym("bob"))
    other = ErasureLog(tmp_path / "other", ["bob"])
    assert other.pseudonyms != again.pseudonyms  # whoever has not cannot


def test_a_line_that_was_not_finished_is_left_behind(tmp_path: Path) -> None:
    log = ErasureLog(tmp_path, ["a"])
    log.append("started")
    with log.path.open("a") as stream:
        stream.write('{"event": "era')
    log.append("proved")
    assert [record["event"] for record in read_log(log.path)] == ["started", "proved"]
    assert read_log(tmp_path / "none") == []


def test_a_key_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    ErasureLog(tmp_path, ["a"])
    key = tmp_path / "key"
    key.chmod(0o640)
    with pytest.raises(ValueError, match="can be read by others: `chmod 600"):
        ErasureLog(tmp_path, ["a"])
    key.chmod(0o600)
    key.write_text("short")
    with pytest.raises(ValueError, match="is no key of 32 bytes"):
        ErasureLog(tmp_path, ["a"])


def test_one_erasure_at_a_time(tmp_path: Path) -> None:
    log = ErasureLog(tmp_path, ["a"])
    with log.alone(), pytest.raises(ValueError, match="another erasure is at work"), log.alone():
        pass
    with log.alone():
        pass
