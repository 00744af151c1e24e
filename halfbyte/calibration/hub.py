"""Data sets of the hub, through `datasets` (extra `calibrate`), streamed. The one file that touches `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from halfbyte.calibration.records import Document, record_document
from halfbyte.calibration.spec import HUB_LIMIT, Source
from halfbyte.calibration.tokens import Tokenizer
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.types import Progress, Quiet


def open_hub(source: Source) -> tuple[Any, str | None]:
    """A data set's stream of records, and its commit where the hub tells it.

    Raises HalfbyteError in one line: `datasets` is missing, no network, no such data set, configuration or split.
    """
    try:
        import datasets
    except ImportError:
        raise HalfbyteError(f"hub:{source.dataset} needs datasets: pip install datasets") from None
    datasets.disable_progress_bars()
    assert source.dataset is not None
    try:
        revision = _commit(source.dataset, source.revision)
        stream = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=revision, streaming=True
        )
        return stream, revision
    except Exception as error:  # datasets, huggingface_hub, fsspec and the HTTP client below all raise their own
        raise refusal(source, error) from error


def read_hub(
    stream: Any, source: Source, tokenizer: Tokenizer | None, progress: Progress | None = None
) -> Iterator[Document]:
    """The documents of an opened data set: the first `limit`, HUB_LIMIT where none is given."""
    progress = progress or Quiet()
    limit = source.limit or HUB_LIMIT
    progress.start(f"reading {source.name}, documents", limit)
    records, count = iter(stream), 0
    while count < limit:
        try:
            record = next(records, None)
        except Exception as error:  # as above, in the middle of the stream
            raise refusal(source, error) from error
        if record is None:
            break
        count += 1
        if count % 256 == 0:
            progress.advance(256)
        yield record_document(record, f"hub:{source.dataset} record {count}", source.name, tokenizer, source.field)
    if not count:
        raise UsageError(f"hub:{source.dataset} holds no record in split {source.split}: name another split")


def refusal(source: Source, error: Exception) -> HalfbyteError:
    """An error of the libraries below in one line that says what to do."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    where = f"hub:{source.dataset}"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "GatedRepoError"}:
        return UsageError(f"{where} is no data set that the hub shows you: check the name, or log in if it is private")
    if names & {"OfflineModeIsEnabled", "ConnectionError", "ConnectError", "TransportError", "TimeoutException"}:
        return HalfbyteError(f"{where} cannot be reached ({reason}): go online, or fetch its files and name those")
    return HalfbyteError(f"{where} cannot be read: {reason}")


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a data set is at, so that the manifest pins it."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision).sha
