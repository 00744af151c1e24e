"""What one group of linears does alone: the BF16 model with that group swapped, against itself, on held tokens.

The model is held whole. The hidden states at every block's input are kept, so that a group of block b costs a run of
the blocks from b on; the reference's log-probabilities are kept too. Arithmetic is float32 unless asked otherwise: a
lone group's KL may lie below the noise of bfloat16, which would add the same constant to each of a hundred groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.engine import Skeleton
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import Windows
from halfbyte.evaluate.scoring import CHUNK_ELEMENTS, scored_positions
from halfbyte.evaluate.windows import batches
from halfbyte.models import Checkpoint, Expert


class LoneMeter:
    """Holds the model and what it computes on `windows`; `kl` measures it with some tensors swapped.

    power     by full linear name: E||W x||^2 over the windows' tokens, without the bias (lm_head: over the scored ones;
              an expert's linears: over the tokens routed to it, by the square of the router's weight)
    window    int64 [N]: the window of each scored token, in the order of `kl`'s results
    Raises HalfbyteError where a tensor is missing or the model gives NaN.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Windows,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_tokens: int = 1024,
    ):
        self.skeleton = Skeleton(checkpoint, device, dtype)
        self.model: Any = self.skeleton.model
        self.blocks = [self.skeleton.load_block(i) for i in range(self.skeleton.family.num_blocks)]
        _fill_head(self.skeleton, checkpoint)
        taken = list(batches(windows, batch_tokens))
        self.shapes = [tuple(ids.shape) for _, ids in taken]
        places = [scored_positions(windows, members, ids.shape[1]) for members, ids in taken]
        self.window = torch.cat([torch.tensor(m)[row] for (m, _), (row, _) in zip(taken, places)])
        self.places = [(row.to(device), (at - 1).to(device)) for row, at in places]
        self._reference(windows, taken)

    @torch.no_grad()
    def _reference(self, windows: Windows, taken: list[tuple[list[int], Tensor]]) -> None:
        """Run the untouched model once: the inputs of every block, the log-probabilities, the linears' powers."""
        first, self.arguments = self.skeleton.embed(ids for _, ids in taken)
        self.inputs: list[list[Tensor]] = [first]
        lengths = [torch.tensor([len(windows.ids[i]) for i in members]) for members, _ in taken]
        keeps = [torch.arange(shape[1]) < length[:, None] for shape, length in zip(self.shapes, lengths)]
        total = float(sum(int(length.sum()) for length in lengths))
        sums: dict[str, float] = {}
        with _powers(self.model, self.skeleton.family.linears, len(self.blocks), sums) as at:
            for index in range(len(self.blocks)):
                outputs = []
                for batch in range(len(taken)):
                    at["keep"] = keeps[batch].to(first[0].device)
                    outputs.append(self._block(index, batch, self.inputs[index][batch]))
                self.inputs.append(outputs)
        self.power = {name: value / total for name, value in sums.items()}
        self.logp = [z.log_softmax(-1) for z in self._logits(self.inputs[-1])]
        if not all(bool(chunk.isfinite().all()) for chunk in self.logp):
            raise HalfbyteError("the BF16 model gives NaN or infinite logits on the held tokens: fetch it again")
        if not self.skeleton.family.tied:
            square = sum(float(self.model.lm_head(x).float().square().sum()) for x in self._rows(self.inputs[-1]))
            self.power[self.skeleton.family.lm_head] = square / max(1, len(self.window))

    def _block(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        out = self.blocks[index](hidden, **self.arguments[self.shapes[batch]][index])
        return out[0] if isinstance(out, tuple) else out

    def _rows(self, hidden: list[Tensor]) -> list[Tensor]:
        """lm_head's inputs at the scored positions, in chunks of a bounded number of logits."""
        size = max(1, CHUNK_ELEMENTS.get(self.skeleton.device.type, 1 << 20) * 4 // self.model.lm_head.out_features)
        chunks: list[Tensor] = []
        for x, (row, at) in zip(hidden, self.places):
            if len(row):
                chunks += self.skeleton.normed(x)[row, at].split(size)
        return chunks

    def _logits(self, hidden: list[Tensor]) -> Iterator[Tensor]:
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        for x in self._rows(hidden):
            z = self.model.lm_head(x).float()
            yield torch.tanh(z / cap) * cap if cap else z

    @torch.no_grad()
    def kl(self, start: int, values: Mapping[str, Tensor]) -> Tensor:
        """KL(model || model with `values` in place of those tensors) in nats: float64 [N], one per scored token.

        start     the first block that the tensors belong to; the number of blocks for lm_head alone
        values    by full tensor name, any float dtype; the tensors are put back afterwards
        """
        with _swapped(self.model, values):
            hidden = self.inputs[start]
            for index in range(start, len(self.blocks)):
                hidden = [self._block(index, batch, x) for batch, x in enumerate(hidden)]
            parts = [
                nn.functional.kl_div(z.log_softmax(-1), logp, reduction="none", log_target=True).sum(-1).double()
                for z, logp in zip(self._logits(hidden), self.logp)
            ]
        return torch.cat(parts).clamp_min_(0.0).cpu()


def _fill_head(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    name = f"{skeleton.family.lm_head}.weight"
    tied = skeleton.family.tied or not checkpoint.has(name)
    source = skeleton.inner.get_parameter("embed_tokens.weight") if tied else checkpoint.load(name)
    value = source.to(skeleton.device, skeleton.dtype)
    skeleton.model.get_submodule("lm_head").weight = nn.Parameter(value, requires_grad=False)


@contextmanager
def _swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    parameters = {name: model.get_parameter(name) for name in values}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(before[name].device, before[name].dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


@contextmanager
def _powers(model: nn.Module, linears: Any, blocks: int, sums: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Hooks that sum ||W x||^2 by linear over the tokens of state["keep"] (bool [B, T])."""
    state: dict[str, Any] = {}

    def watch(name: str, linear: nn.Module) -> Any:
        owner = model.get_submodule(name.rpartition(".")[0])

        def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
            bias, keep = getattr(linear, "bias", None), state["keep"].flatten()
            y = (out if bias is None else out - bias).flatten(0, -2)
            if isinstance(owner, Expert):
                y, keep = y * owner.weights[:, None], keep[owner.tokens]
            sums[name] = sums.get(name, 0.0) + float(y[keep].float().square().sum())

        return linear.register_forward_hook(hook)

    names = [name for index in range(blocks) for name in linears(index)]
    handles = [watch(name, model.get_submodule(name)) for name in names]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()
