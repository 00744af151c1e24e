"""Local files as streams of documents, a bounded piece at a time: plain text, JSONL (gzip too), Parquet.

A plain text is one running text of paragraphs; what they are (blank lines or line ends part them) is told by its
first megabyte. Records of JSONL and Parquet are documents of their own. No file is held in memory.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from halfbyte.calibration import parquet
from halfbyte.calibration.records import Document, all_strings, clean, kind_of, parse_record, record_document
from halfbyte.calibration.tokens import Tokenizer
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.types import Progress, Quiet

JSONL = (".jsonl", ".ndjson", ".json")
LINE_LIMIT = 64 << 20
"""Bytes of one line of JSON; a longer one is refused."""
_CHUNK = 1 << 20
_BLANK = re.compile(r"\n[^\S\n]*\n\s*(?=\S)")
_LINE = re.compile(r"\n(?=.)", re.S)


def read_file(
    path: Path,
    tokenizer: Tokenizer | None = None,
    *,
    field: str | None = None,
    whole_records: bool = False,
    progress: Progress | None = None,
) -> Iterator[Document]:
    """The documents of a file, in order, as they are read.

    field           the field of records that holds text or messages; see record_document.
    whole_records   take every string of a record instead (text to be searched, not to be learnt from).
    Raises UsageError for a file that cannot be read, HalfbyteError with the line for a bad one.
    """
    kind = kind_of_file(path)
    if field is not None and kind == "text":
        raise UsageError(f"{path} is plain text and has no field {field!r}: leave it out, or name a JSONL file")
    found = False
    for document in _read(path, kind, tokenizer, field, whole_records, progress or Quiet()):
        found = found or bool(document.text.strip())
        yield document
    if not found:
        raise UsageError(f"{path} holds no text: name another file")


def kind_of_file(path: Path) -> str:
    """ "jsonl", "parquet" or "text", by the name's ending."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    if path.suffix.lower() == ".parquet":
        return "parquet"
    return "jsonl" if suffix.lower() in JSONL else "text"


def _read(
    path: Path, kind: str, tokenizer: Tokenizer | None, field: str | None, whole: bool, progress: Progress
) -> Iterator[Document]:
    if kind == "text":
        yield from _paragraphs(path, progress)
        return
    records = _parquet_rows(path, field, whole, progress) if kind == "parquet" else _lines(path, progress)
    for where, record in records:
        if whole:
            yield Document(all_strings(record), path.name)
        else:
            yield record_document(record, where, path.name, tokenizer, field)


def _parquet_rows(path: Path, field: str | None, whole: bool, progress: Progress) -> Iterator[tuple[str, Any]]:
    with _opened(path, progress) as (handle, tick):
        for number, record in enumerate(parquet.rows(path, handle, field, every_column=whole), start=1):
            if number % 1024 == 0:
                tick()
            yield f"{path} row {number}", record


def _lines(path: Path, progress: Progress) -> Iterator[tuple[str, Any]]:
    with _opened(path, progress) as (handle, tick):
        number = 0
        while line := handle.readline(LINE_LIMIT + 1):
            number += 1
            where = f"{path} line {number}"
            if len(line) > LINE_LIMIT:
                raise HalfbyteError(f"{where} is longer than {LINE_LIMIT >> 20} MiB: split its record")
            if number % 1024 == 0:
                tick()
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise HalfbyteError(f"{where} is not UTF-8 text (byte {error.start}): convert the file") from None
            if text.strip():
                yield where, parse_record(text, where)


def _paragraphs(path: Path, progress: Progress) -> Iterator[Document]:
    """Pieces of running text; joined, they give back the file. One longer than a chunk is cut anywhere."""
    border = None
    first, rest = True, ""
    for chunk in _text(path, progress):
        rest += chunk
        border = border or (_BLANK if _BLANK.search(rest) else _LINE)
        start = 0
        for match in border.finditer(rest):
            yield _piece(rest[start : match.end()], path.name, first)
            start, first = match.end(), False
        rest = rest[start:]
        if len(rest) >= _CHUNK:
            yield _piece(rest, path.name, first)
            rest, first = "", False
    if rest:
        yield _piece(rest, path.name, first)


def _piece(text: str, origin: str, first: bool) -> Document:
    return Document(clean(text), origin, continues=not first, kind=kind_of(text))


def _text(path: Path, progress: Progress) -> Iterator[str]:
    decoder, at = codecs.getincrementaldecoder("utf-8-sig")(), 0
    carried = ""
    with _opened(path, progress) as (handle, tick):
        while True:
            data = handle.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                text = carried + decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                where = at - pending + error.start
                raise UsageError(f"{path} is not UTF-8 text (byte {where}): convert it first") from None
            if "\0" in text:
                raise UsageError(f"{path} is not text (it has NUL bytes): name a text, JSONL or Parquet file")
            carried = "\r" if data and text.endswith("\r") else ""
            yield text.removesuffix(carried).replace("\r\n", "\n").replace("\r", "\n")
            if not data:
                return
            at += len(data)
            tick()


@contextmanager
def _opened(path: Path, progress: Progress) -> Iterator[tuple[IO[bytes], Any]]:
    """The file's bytes (gzip undone) and a function that reports how far they were read."""
    try:
        with path.open("rb") as raw:
            progress.start(f"reading {path.name}, KiB", max(1, path.stat().st_size >> 10))
            told = 0

            def tick() -> None:
                nonlocal told
                here = raw.tell() >> 10
                progress.advance(here - told)
                told = here

            handle: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            yield handle, tick
            tick()
    except FileNotFoundError:
        raise UsageError(missing(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path} is a broken gzip file ({error}): make or fetch it again") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def missing(path: Path) -> str:
    """What to tell of a file that is not there."""
    return f"{path} does not exist: name a text, JSONL or Parquet file, or hub:DATASET for a data set of the hub"
