"""Text files, plain or gzip, as numbered lines; a large plain file divides into spans that are read independently."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

from userrep.config import ConfigError
from userrep.data.sources.validate import MAX_BATCH_ROWS, Spoiled

Encoding = Literal["utf-8", "latin-1"]
SPAN_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 16 << 20  # a longer line is no record but a broken file; bounds the memory of a part
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Span(NamedTuple):
    """A stretch of whole lines."""

    path: Path
    name: str  # how rows refer to the file
    start: int  # byte offset; 0 for a compressed file
    stop: int | None  # byte offset; None: to the end
    first_line: int  # 1-based


class Lines(NamedTuple):
    """Some consecutive lines, without line ends; blank lines are left out."""

    numbers: list[int]  # 1-based line of each text
    texts: list[str]
    spoiled: list[Spoiled]  # lines that cannot be decoded or are too long


def spans(path: Path, name: str) -> list[Span]:
    """Divides a file into spans of about `SPAN_BYTES`. A compressed or small file is one span.

    A large file is read once here to count its lines, at about the speed of the disk.
    """
    size = path.stat().st_size
    if path.suffix == ".gz" or size <= SPAN_BYTES:
        return [Span(path, name, 0, None, 1)]
    found: list[Span] = []
    start, line, position = 0, 1, 0
    with path.open("rb") as stream:
        while block := stream.read(SPAN_BYTES):
            cut = block.rfind(b"\n") + 1
            if cut:
                found.append(Span(path, name, start, position + cut, line))
                start, line = position + cut, line + block.count(b"\n")
            position += len(block)
    if start < position:
        found.append(Span(path, name, start, position, line))
    return found


def read_lines(span: Span, encoding: Encoding) -> Iterator[Lines]:
    """Yields the lines of a span, at most `MAX_BATCH_ROWS` at a time.

    Raises:
        ConfigError: the file is damaged gzip, so that an unknown number of lines is missing.
    """
    number = span.first_line
    with _open(span.path) as stream:
        if span.start:
            stream.seek(span.start)
        try:
            for raw in _raw_lines(stream, None if span.stop is None else span.stop - span.start):
                if number == 1 and raw[0].startswith(_BYTE_ORDER_MARK) and encoding == "utf-8":
                    raw[0] = raw[0].removeprefix(_BYTE_ORDER_MARK)
                for begin in range(0, len(raw), MAX_BATCH_ROWS):
                    yield _decode(raw[begin : begin + MAX_BATCH_ROWS], number + begin, encoding)
                number += len(raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(
                f"{span.path} is damaged after line {number - 1} ({error}), so records are missing: get the file again"
            ) from error


def first_line(path: Path, encoding: Encoding) -> str:
    """The first line of a file, decoded; empty when the file is.

    Raises:
        ConfigError: it is not text of this encoding.
    """
    with _open(path) as stream:
        line = stream.readline(MAX_LINE_BYTES).removeprefix(_BYTE_ORDER_MARK)
    try:
        return line.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"line 1 of {path} is not {encoding} text ({error}): set another `encoding`") from error


def data_file(folder: Path, name: str) -> Path | None:
    """The file of this name, or its `.gz`, in the folder; None when there is neither."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _raw_lines(stream: BinaryIO, remaining: int | None) -> Iterator[list[bytes]]:
    """Whole lines, block by block, of `remaining` bytes (None: all). An over-long line is cut past MAX_LINE_BYTES."""
    rest = b""
    is_skipping = False  # inside an over-long line, of which enough has been kept
    while block := stream.read(BLOCK_BYTES if remaining is None else min(BLOCK_BYTES, remaining)):
        remaining = None if remaining is None else remaining - len(block)
        if is_skipping:
            end = block.find(b"\n")
            if end < 0:
                continue
            block, is_skipping = block[end:], False
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if len(rest) > MAX_LINE_BYTES:
            rest, is_skipping = rest[: MAX_LINE_BYTES + 1], True
        if lines:
            yield lines
    if rest:
        yield [rest]


def _decode(raw: list[bytes], number: int, encoding: Encoding) -> Lines:
    spoiled: list[Spoiled] = []
    texts: list[str | None]
    try:
        texts = list(b"\n".join(raw).decode(encoding).split("\n"))
    except UnicodeDecodeError:
        texts = []
        for offset, line in enumerate(raw):
            try:
                texts.append(line.decode(encoding))
            except UnicodeDecodeError:
                texts.append(None)
                spoiled.append(Spoiled(number + offset, "bad_encoding", line.decode(encoding, "backslashreplace")))
    if max(map(len, raw)) > MAX_LINE_BYTES:
        for offset, line in enumerate(raw):
            text = texts[offset]
            if text is not None and len(line) > MAX_LINE_BYTES:
                texts[offset] = None
                spoiled.append(Spoiled(number + offset, "broken_line", text))
    kept = [(number + offset, text.removesuffix("\r")) for offset, text in enumerate(texts) if text and text.strip()]
    return Lines([line for line, _ in kept], [text for _, text in kept], sorted(spoiled))
