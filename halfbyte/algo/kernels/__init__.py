"""Triton kernels for what torch does on a GPU in thousands of launches: GPTQ's column loop and the searches for scales.

Each equals a torch function elsewhere in `algo`, which runs where Triton does not and is the oracle of the tests.
Codes and scales are the same but where the order of a float32 sum decides a tie. triton is imported by the kernels'
own files alone, so that this one can be asked without it.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch

WIDEST = 16384
"""Columns of the widest group that a search holds in registers."""


def usable(tensor: torch.Tensor, group_size: int = 0) -> bool:
    """Whether kernels run where `tensor` lies, with groups of so many columns: on a GPU with a working Triton, or on
    the CPU under its interpreter (TRITON_INTERPRET=1, set before triton is imported)."""
    if group_size > WIDEST:
        return False
    if tensor.is_cuda:
        return _works(tensor.get_device())
    return tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


@cache
def _works(device: int) -> bool:
    """Compile and run the smallest kernel: Triton may be there without the C compiler or the driver it needs."""
    if find_spec("triton") is None:
        return False
    try:
        from halfbyte.algo.kernels.rounding import probe

        return probe(torch.device("cuda", device))
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        warnings.warn(f"Triton does not run on cuda:{device}, torch does its work slower: {reason}", stacklevel=2)
        return False
