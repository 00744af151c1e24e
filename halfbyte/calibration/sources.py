"""Text files and JSONL files read whole into documents, for running text that is cut as it stands.

A plain text file is one running text of paragraphs (split at blank lines, or at line ends where it has none);
joined, its documents give back the file exactly. A JSONL line is a document of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from halfbyte.calibration.records import Document, parse_record, record_document
from halfbyte.calibration.tokens import Tokenizer
from halfbyte.errors import UsageError

JSONL = (".jsonl", ".ndjson")


def read_documents(
    paths: Sequence[Path | str], tokenizer: Tokenizer | None = None, portion: tuple[float, float] = (0.0, 1.0)
) -> list[Document]:
    """All documents of `paths`, in order.

    tokenizer   renders `messages` through its chat template; needed for those alone.
    portion     the share of each file's documents that is taken, so that one file can serve two disjoint purposes:
                (0, 0.8) to calibrate, (0.8, 1) to evaluate.
    Raises UsageError for a missing, unreadable or empty file, HalfbyteError (with the line) for a bad JSONL line.
    """
    low, high = portion
    if not 0 <= low < high <= 1:
        raise UsageError(f"portion {low}..{high} is no part of a file: use 0 <= low < high <= 1")
    found: list[Document] = []
    for path in map(Path, paths):
        text = _read(path)
        documents = _jsonl(path, text, tokenizer) if path.suffix.lower() in JSONL else _paragraphs(path, text)
        taken = documents[int(low * len(documents)) : int(high * len(documents))]
        if not taken:
            raise UsageError(f"{path} holds no text: name another file")
        found += [Document(taken[0].text, taken[0].origin), *taken[1:]]
    return found


def describe_files(paths: Sequence[Path | str]) -> list[dict]:
    """Name, bytes and SHA-256 of each file, for manifests."""
    described = []
    for path in map(Path, paths):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        described.append({"file": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return described


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist: name a text or JSONL file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _paragraphs(path: Path, text: str) -> list[Document]:
    lines = text.splitlines(keepends=True)
    blank = [not line.strip() for line in lines]
    if any(blank):
        ends = [i + 1 for i in range(len(lines) - 1) if blank[i] and not blank[i + 1]]
    else:
        ends = list(range(1, len(lines)))
    bounds = [0, *ends, len(lines)]
    pieces = ["".join(lines[a:b]) for a, b in pairwise(bounds)]
    if not text.strip():
        return []
    return [Document(piece, path.name, continues=i > 0) for i, piece in enumerate(pieces)]


def _jsonl(path: Path, text: str, tokenizer: Tokenizer | None) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        document = record_document(parse_record(line, where), where, path.name, tokenizer)
        if document.text.strip():
            documents.append(document)
    return documents
