"""Parameters by their full names."""

from __future__ import annotations

import torch
from torch import nn


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make `value` the parameter `name` (dotted) of a module; it asks for no gradient."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
