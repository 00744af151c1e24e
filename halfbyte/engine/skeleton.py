"""A model of which only one block is ever in memory, run block by block with the arguments the model itself makes.

The model is built with its parameters on the meta device. Each block is replaced by a recorder that notes the keyword
arguments it is called with (masks, position embeddings, local or global) and hands its input on; one forward of the
model with the recorders in place gives every block's arguments for a batch shape, without knowing the family.

Parameters have the checkpoint's names: the experts of a mixture are linears of their own (models/experts.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from halfbyte.engine.weights import Weights
from halfbyte.errors import HalfbyteError
from halfbyte.models import Checkpoint, Family, set_parameter, unfuse
from halfbyte.models.library import refuse_misfits, structure_of


class Hidden(Protocol):
    """What takes in batches' hidden states: a list, or Activations."""

    def append(self, value: torch.Tensor, /) -> None: ...


class _Recorder(nn.Module):
    """Stands where a block stands: keeps its keyword arguments, returns its input."""

    def __init__(self, sink: dict[int, dict[str, Any]], index: int):
        super().__init__()
        self.sink, self.index = sink, index

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            raise HalfbyteError("this transformers release passes block arguments by position: not supported")
        self.sink[self.index] = kwargs
        return hidden_states


class Skeleton:
    """One model, streamed. `device` and `dtype` (bfloat16) are where and in what blocks are run."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.weights = Weights(checkpoint, self.device, dtype)
        self.family: Family = self.weights.family
        model = structure_of(checkpoint, dtype)
        unfuse(model, self.family)
        self.model: nn.Module = model.eval()
        self.inner: nn.Module = model.model
        self.blocks: list[nn.Module] = list(self.inner.layers)
        self._head: torch.Tensor | None = None
        self._fill(self.inner.embed_tokens, "model.embed_tokens.")
        self._fill(self.inner.norm, "model.norm.")
        for module in self.inner.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device != self.device:
                    setattr(module, name, buffer.to(self.device))

    def _fill(self, module: nn.Module, prefix: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
        tensors = self.checkpoint.load_all(prefix) if tensors is None else tensors
        wanted = {name: parameter.shape for name, parameter in module.named_parameters()}
        refuse_misfits(self.checkpoint.path, wanted, {name: t.shape for name, t in tensors.items()}, prefix)
        for name in wanted:
            set_parameter(module, name, tensors[name].to(self.device, self.dtype))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm's output: what lm_head reads."""
        return self.inner.get_submodule("norm")(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits, float32 [..., V], from the last block's output [..., D]."""
        return self.head(self.normed(hidden))

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        """The logits, float32 [..., V], from the final norm's output [..., D]."""
        out = nn.functional.linear(normed, self._head_weight()).float()
        cap = self.checkpoint.config.get("final_logit_softcapping")
        return torch.tanh(out / cap) * cap if cap else out

    def _head_weight(self) -> torch.Tensor:
        if self.family.tied:
            return self.inner.get_parameter("embed_tokens.weight")
        if self._head is None:
            self._head = self.checkpoint.load(f"{self.family.lm_head}.weight").to(self.device, self.dtype)
        return self._head

    def drop_head(self) -> None:
        """Let go of lm_head; it is loaded again when logits are asked for."""
        self._head = None

    def load_block(
        self, index: int, given: dict[str, torch.Tensor] | None = None, then: int | None = None
    ) -> nn.Module:
        """Block `index` with its weights, in `dtype` on `device`; `given` ones (by name within the block) stand in for
        the checkpoint's. then: the block to load next, which a GPU is sent meanwhile."""
        block = self.blocks[index]
        prefix = self.family.block(index) + "."
        if given is None:
            self._fill(block, prefix, self.weights.block(index, then))
        else:
            rest = {n: self.checkpoint.load(prefix + n) for n, _ in block.named_parameters() if n not in given}
            self._fill(block, prefix, given | rest)
        return block

    def drop_block(self, index: int) -> None:
        """Let go of a block's weights."""
        block = self.blocks[index]
        for name, parameter in list(block.named_parameters()):
            set_parameter(block, name, torch.empty_like(parameter, device="meta"))

    @torch.no_grad()
    def embed(
        self, batches: Iterable[torch.Tensor], hidden: Hidden | None = None
    ) -> tuple[Any, dict[Any, dict[int, dict[str, Any]]]]:
        """Token batches (int64 [B, T]) to the first block's inputs ([B, T, D]), appended to `hidden` (None: to a list),
        and, per batch shape, every block's keyword arguments."""
        arguments: dict[Any, dict[int, dict[str, Any]]] = {}
        hidden = [] if hidden is None else hidden
        real = self.inner.layers
        try:
            for ids in batches:
                sink: dict[int, dict[str, Any]] = {}
                self.inner.layers = nn.ModuleList(_Recorder(sink, i) for i in range(len(self.blocks)))
                first: list[torch.Tensor] = []
                hook = self.inner.layers[0].register_forward_pre_hook(lambda _m, a, f=first: f.append(a[0]))
                self.inner(input_ids=ids.to(self.device), use_cache=False)
                hook.remove()
                hidden.append(first[0])
                arguments.setdefault(tuple(ids.shape), sink)
        finally:
            self.inner.layers = real
        return hidden, arguments
