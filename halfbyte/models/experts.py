"""Mixtures of experts with a linear for each projection of each expert, as checkpoints and quantizers see them.

transformers holds all experts of a block in two 3-D parameters (gate and up of an expert stacked) and converts a
checkpoint's tensors when it loads them; it may also call the module otherwise. `unfuse` puts linears with the
checkpoint's names into a model, `refuse` puts transformers' own parameters back. The model computes the same either
way, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.models.family import Family, Mixture


class Expert(nn.Module):
    """One expert. `tokens` int64 [n] and `weights` [n]: the rows of the last input that were routed to it."""

    def __init__(self, projections: tuple[str, str, str], hidden: int, width: int, act: Any, like: torch.Tensor):
        super().__init__()
        self.projections, self.act = projections, act
        self.tokens = self.weights = torch.empty(0)
        for name, (i, o) in zip(projections, ((hidden, width), (hidden, width), (width, hidden))):
            setattr(self, name, nn.Linear(i, o, bias=False, device=like.device, dtype=like.dtype))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        """What the down projection reads."""
        gate, up, _ = (self.get_submodule(name) for name in self.projections)
        return self.act(gate(x)) * up(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.projections[2])(self.middle(x))


class Experts(nn.ModuleList):
    """All experts of a block, called as transformers calls its own: tokens [n, D], for each the chosen experts [n, k]
    and their weights [n, k]."""

    def __init__(self, fused: nn.Module, projections: tuple[str, str, str]):
        like = fused.get_parameter("down_proj")
        count, hidden, width = like.shape
        super().__init__(Expert(projections, hidden, width, fused.act_fn, like) for _ in range(count))
        self.__dict__["fused"] = fused  # not a child: its parameters are these experts'

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, place = torch.where(top_k_index == number)
            weights = top_k_weights[tokens, place]
            expert.tokens, expert.weights = tokens, weights.detach()
            if len(tokens):
                y = expert(hidden_states[tokens]) * weights[:, None]
                out.index_add_(0, tokens, y.to(out.dtype))
        return out


def unfuse(model: nn.Module, family: Family) -> None:
    """Give a transformers model's experts their own linears, in place: names are then the checkpoint's. What the fused
    parameters held is dropped."""
    for block, mixture in _sparse(model, family):
        sparse = block.get_submodule("mlp")
        sparse.experts = Experts(sparse.get_submodule("experts"), mixture.projections)
        _rename(block, mixture)


def _sparse(model: nn.Module, family: Family) -> Iterator[tuple[nn.Module, Mixture]]:
    for index in family.sparse:
        mixture = family.mixture(index)
        assert mixture is not None
        yield model.get_submodule(family.block(index)), mixture


def _rename(block: nn.Module, mixture: Mixture) -> None:
    """Register the sparse MLP under the checkpoint's name; transformers' forward goes on finding it as `mlp`."""
    if mixture.module != "mlp":
        sparse = block.get_submodule("mlp")
        del block.mlp
        block.add_module(mixture.module, sparse)
        block.__dict__["mlp"] = sparse


def refuse(model: nn.Module, family: Family) -> None:
    """Undo `unfuse`: transformers' own modules and names, with the weights that the experts hold now."""
    for block, mixture in _sparse(model, family):
        sparse = block.get_submodule(mixture.module)
        experts = sparse.get_submodule("experts")
        fused = experts.__dict__["fused"]
        gate, up, down = (
            [expert.get_parameter(f"{name}.weight") for expert in experts.children()] for name in mixture.projections
        )
        fused.gate_up_proj = _stacked([torch.cat(pair) for pair in zip(gate, up)])
        fused.down_proj = _stacked(down)
        sparse.experts = fused
        if mixture.module != "mlp":
            del block.__dict__["mlp"]
            delattr(block, mixture.module)
            block.mlp = sparse


def _stacked(weights: Sequence[torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack(list(weights)), requires_grad=False)
