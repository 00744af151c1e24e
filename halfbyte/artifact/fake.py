"""The reference for every served figure: the artifact's own unpacked weights in the transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halfbyte.algo import dequantize
from halfbyte.errors import HalfbyteError
from halfbyte.formats import columns, read_config
from halfbyte.models import Checkpoint, family_of, refuse, set_parameter, unfuse
from halfbyte.types import Scheme


def load_fake_quantized(directory: Path | str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """A transformers causal LM with the artifact's dequantized weights in `dtype`, in eval mode.

    Raises UsageError for a directory that is no model, HalfbyteError where a tensor is missing.
    """
    from accelerate import init_empty_weights  # here, for they take seconds, and a finished run needs no model
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    checkpoint = Checkpoint(directory)
    family = family_of(checkpoint.config)
    names = [n for i in range(family.num_blocks) for n in family.linears(i)] + [family.lm_head]
    declared = checkpoint.config.get("quantization_config")
    if not declared:
        raise HalfbyteError(f"{directory} is not quantized: its config.json has no quantization_config")
    form, schemes = read_config(declared, names)
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    unfuse(model, family)
    for name, scheme in schemes.items():
        owned = checkpoint.load_all(name + ".")
        if scheme is None or (
            set(owned) <= {"weight", "bias"} and owned.get("weight", torch.empty(0)).dtype != torch.uint8
        ):
            continue
        tensors = {f"{name}.{leaf}": value for leaf, value in owned.items()}
        width = model.get_submodule(name).in_features
        stated = Scheme(scheme.grid, columns(scheme.group_size, width))
        set_parameter(model, f"{name}.weight", dequantize(form.unpack(name, tensors, stated)).to(device, dtype))
    for name, _ in list(model.named_parameters()):
        if checkpoint.has(name) and model.get_parameter(name).is_meta:
            set_parameter(model, name, checkpoint.load(name).to(device, dtype))
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise HalfbyteError(f"{directory} lacks the tensor {missing[0]}: run `halfbyte check {directory}`")
    refuse(model, family)
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)  # it says where answers end
    return model.to(device).eval()
