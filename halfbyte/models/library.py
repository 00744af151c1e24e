"""What transformers makes of a model directory. It is imported when it is asked, for that takes seconds: 3 to 10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.experts import unfuse
from halfbyte.models.family import family_of

VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}
"""Files of which a tokenizer has one at least."""


class Misfit(HalfbyteError):
    """A model's weights are not those that its config.json describes."""


def structure_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformers model that config.json describes, without weights. The first one of its class takes seconds, in
    which Python imports it. Raises HalfbyteError, in one line, where there is none."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        config.use_cache = False
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers may raise anything for a config that makes no sense
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HalfbyteError(f"{checkpoint.path}/config.json describes no model: {reason}") from error


def refuse_unlike(checkpoint: Checkpoint) -> None:
    """Raise HalfbyteError, in a line, where config.json describes no model; Misfit where the weights are not of it."""
    model = structure_of(checkpoint)
    unfuse(model, family_of(checkpoint.config))
    wanted = {f"model.{name}": tuple(parameter.shape) for name, parameter in model.model.named_parameters()}
    refuse_misfits(checkpoint.path, wanted, {name: info.shape for name, info in checkpoint.tensors.items()})


def refuse_misfits(
    path: Path, wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], prefix: str = ""
) -> None:
    """Raise Misfit where the shapes found are not those that config.json makes; names after `prefix`."""
    missing = wanted.keys() - found.keys()
    if missing:
        raise Misfit(f"{path} lacks the tensor {prefix}{min(missing)}: is the model whole?")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            which = f"{list(found[name])}, and config.json makes it {list(shape)}"
            raise Misfit(f"{path}: {prefix}{name} is {which}: do they belong together?")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory. Raises HalfbyteError where there is none."""
    from transformers import AutoTokenizer

    files = Checkpoint(path).tokenizer_files()
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # files of a stranger may make the library raise anything
        if not {file.name for file in files} & VOCABULARIES:
            text = "copy its tokenizer files there (tokenizer.json, tokenizer_config.json)"
            raise HalfbyteError(f"{path} has no tokenizer that transformers can load: {text}") from error
        reason = (str(error).strip().splitlines() or [""])[0]
        reason = reason if isinstance(error, (OSError, ValueError)) and reason else f"{type(error).__name__} {reason}"
        raise HalfbyteError(f"{path} has no tokenizer that transformers can load: {reason}") from error


def load_model(path: Path, device: str = "cpu") -> Any:
    """The BF16 model, in eval mode."""
    from transformers import AutoModelForCausalLM

    Checkpoint(path).tensors  # noqa: B018  a missing or truncated shard gets its one line here
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True
        )
        return model.to(device).eval()
    except MemoryError:
        raise
    except Exception as error:  # as above
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HalfbyteError(f"{path} cannot be loaded by transformers: {reason}") from error
