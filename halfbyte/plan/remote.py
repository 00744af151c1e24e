"""A hub model as headers: config.json and the safetensors headers are fetched, a few MB whatever the model's size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from halfbyte.models import Checkpoint, TensorInfo, hub_id
from halfbyte.models.source import quiet_hub


class RemoteCheckpoint(Checkpoint):
    """A model on the hub whose weights stay there. `path` holds its config.json alone."""

    def __init__(self, repo: str):
        from huggingface_hub import hf_hub_download

        quiet_hub()
        self.repo = repo
        super().__init__(Path(hf_hub_download(repo, "config.json")).parent)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of every weight file, from headers that the hub hands out by byte ranges."""
        from huggingface_hub import HfApi

        found = {}
        for file, header in HfApi().get_safetensors_metadata(self.repo).files_metadata.items():
            for name, tensor in header.tensors.items():
                start, stop = tensor.data_offsets
                found[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), stop - start, self.path / file)
        return found


def open_for_plan(model: str, resolve: Callable[[], Path]) -> Checkpoint:
    """The checkpoint that a plan reads: a hub model's headers where the hub gives them, else what `resolve` finds."""
    if hub_id(model) == model:
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, SafetensorsParsingError
        from huggingface_hub.errors import NotASafetensorsRepoError as NoSafetensors

        try:
            remote = RemoteCheckpoint(model)
            _ = remote.tensors
            return remote
        except (HfHubHTTPError, LocalEntryNotFoundError, NoSafetensors, SafetensorsParsingError, OSError, ValueError):
            pass
    return Checkpoint(resolve())
