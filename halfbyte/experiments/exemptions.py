"""From lone damages to a recipe: which fused groups to keep in BF16 when so many bits a weight may be spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import UsageError
from halfbyte.files import make_directory, write_text
from halfbyte.plan.inventory import Footprint
from halfbyte.recipe import Recipe

RECIPE = "recipe.yaml"


def group_rows(prints: Sequence[Footprint]) -> list[dict[str, Any]]:
    """The fused groups that a recipe quantizes, in the model's order, with what they weigh: rows of sensitivity.json
    before anything is measured."""
    found: dict[str, list[Footprint]] = {}
    for one in prints:
        if one.plan.scheme is not None:
            found.setdefault(one.plan.fused, []).append(one)
    rows = []
    for order, (fused, members) in enumerate(found.items()):
        plan, scheme = members[0].plan, members[0].plan.scheme
        assert scheme is not None
        rows.append(
            {
                "group": fused,
                "names": [m.plan.name for m in members],
                "block": plan.block,
                "kind": plan.kind if len({m.plan.kind for m in members}) == 1 else "experts",
                "scheme": {"grid": scheme.grid, "group_size": scheme.group_size},
                "weights": sum(m.parameters for m in members),
                "bytes": sum(m.after for m in members),
                "bytes_added": sum(m.before - m.after for m in members),
                "order": order,
            }
        )
    return rows


def check_budget(budget: float, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise UsageError where the budget buys nothing at all, or everything."""
    base, full = bits_of(groups, set()), bits_of(groups, {group["group"] for group in groups})
    if not base <= budget < full:
        what = f"with nothing exempt the recipe takes {base:.3f} bits a weight it quantizes, BF16 takes {full:.3g}"
        raise UsageError(f"--budget {budget:g}: {what}: name a figure between")


def bits_of(groups: Sequence[Mapping[str, Any]], exempt: set[str]) -> float:
    """Average bits a weight of `groups` (of sensitivity.json) with those named in `exempt` in BF16."""
    total = sum(g["bytes"] + (g["bytes_added"] if g["group"] in exempt else 0) for g in groups)
    return 8 * total / max(1, sum(g["weights"] for g in groups))


def choose_exemptions(result: Mapping[str, Any], budget: float) -> dict[str, Any]:
    """Greedily, by lone KL per byte added, the fused groups to keep in BF16 within `budget` bits a weight.

    result   sensitivity.json, whole
    budget   average bits over the weights that the recipe quantizes, those that become exempt among them
    Returns {"bits", "bits_before", "bits_after", "bytes_added", "groups", "names", "kl_saved", "kl_sum", "recipe"};
    kl_saved and kl_sum are sums of lone KLs: a prediction, for damages of several groups do not simply add.
    Raises UsageError for a budget below what the recipe takes or that leaves nothing to quantize.
    """
    groups: Sequence[Mapping[str, Any]] = result["groups"]
    check_budget(budget, groups)
    left = budget * sum(g["weights"] for g in groups) / 8 - sum(g["bytes"] for g in groups)
    taken = []
    for group in sorted(groups, key=lambda g: -g["kl_per_byte"]):
        if group["kl"] > 0 and group["bytes_added"] <= left:
            taken.append(group)
            left -= group["bytes_added"]
    taken.sort(key=lambda g: g["order"])
    names = [name for group in taken for name in _spelled(group)]
    return {
        "bits": budget,
        "bits_before": bits_of(groups, set()),
        "bits_after": bits_of(groups, {g["group"] for g in taken}),
        "bytes_added": sum(g["bytes_added"] for g in taken),
        "groups": [g["group"] for g in taken],
        "names": names,
        "kl_saved": sum(g["kl"] for g in taken),
        "kl_sum": sum(g["kl"] for g in groups),
        "recipe": {**result["recipe"], "ignore": [*result["recipe"]["ignore"], *names]},
    }


def _spelled(group: Mapping[str, Any]) -> list[str]:
    """A group as `ignore` names it: the module of experts, else its linears."""
    whole = group["group"]
    return [whole] if all(name.startswith(f"{whole}.") for name in group["names"]) else group["names"]


def recipe_text(chosen: Mapping[str, Any]) -> str:
    """The chosen recipe as YAML that `load_recipe` reads."""
    said = f"{len(chosen['groups'])} fused groups in BF16 by lone KL per byte: {chosen['bits_after']:.3f} bits a weight"
    recipe = Recipe.model_validate({**chosen["recipe"], "description": said})
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def write_recipe(directory: Path, chosen: Mapping[str, Any]) -> Path:
    """Write recipe.yaml into `directory`; returns its path."""
    path = make_directory(directory) / RECIPE
    write_text(path, recipe_text(chosen))
    return path
