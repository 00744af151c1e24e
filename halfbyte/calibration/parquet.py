"""Parquet files, through pyarrow (extra `calibrate`), a batch of rows at a time. The one file that touches pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from halfbyte.calibration.records import CHAT_FIELDS, did_you_mean
from halfbyte.errors import HalfbyteError, UsageError

_ROWS = 256


def rows(path: Path, handle: IO[bytes], field: str | None, every_column: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as mappings, with the columns that may hold text alone (or every column).

    Raises HalfbyteError where pyarrow is not installed, UsageError for a broken file or a column that is not there.
    """
    try:
        import pyarrow
        import pyarrow.parquet as reader
    except ImportError:
        raise HalfbyteError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        file = reader.ParquetFile(handle)
        names = file.schema_arrow.names
        for batch in file.iter_batches(
            batch_size=_ROWS, columns=names if every_column else _columns(path, names, field)
        ):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} is no Parquet file that can be read ({reason}): make or fetch it again") from None


def _columns(path: Path, names: list[str], field: str | None) -> list[str]:
    if field is not None and field not in names:
        raise UsageError(f"{path} has no column {field!r}{did_you_mean(field, dict.fromkeys(names))}")
    if field is not None:
        return [field]
    usual = next((name for name in ("text", *CHAT_FIELDS) if name in names), None)
    if usual is None:
        raise UsageError(f"{path} has no column `text` or `messages`: name one of {', '.join(names)} with field=")
    return [usual]
