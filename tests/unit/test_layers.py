"""The layer policy: which linear is quantized how, and which requests are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models import Checkpoint
from halfbyte.plan.layers import LinearPlan, assign, quantized
from halfbyte.recipe.schema import Recipe
from halfbyte.types import Scheme
from tests.tiny import make_tiny

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Four blocks, untied; widths 128 and 256."""
    path = tmp_path_factory.mktemp("four")
    return Checkpoint(make_tiny("llama", path, num_hidden_layers=4, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Widths 96 (32 divides, 64 does not) and 80 (16 alone divides)."""
    path = tmp_path_factory.mktemp("odd")
    return Checkpoint(make_tiny("llama", path, hidden_size=96, intermediate_size=80))


def plans(checkpoint: Checkpoint, **settings: object) -> dict[str, LinearPlan]:
    recipe = Recipe.model_validate({"group_size": 64, **settings})
    return {p.name.removeprefix("model.layers."): p for p in assign(recipe, checkpoint)}


def kept(found: dict[str, LinearPlan]) -> set[str]:
    assert all(p.reason for p in found.values() if p.scheme is None), "what stays in BF16 says why"
    return {n for n, p in found.items() if p.scheme is None}


def test_every_linear_has_a_plan(four: Checkpoint) -> None:
    found = plans(four)
    assert len(found) == 4 * 7 + 1 and kept(found) == {"lm_head"}
    q, down = found["2.self_attn.q_proj"], found["2.mlp.down_proj"]
    assert (q.block, q.kind, q.fused) == (2, "qkv", "model.layers.2.self_attn.qkv_proj")
    assert (q.out_features, q.in_features, q.scheme) == (128, 128, Scheme("int4_sym", 64))
    assert (down.out_features, down.in_features, down.kind) == (128, 256, "down")
    assert found["3.self_attn.v_proj"].out_features == 64
    assert found["lm_head"].block is None and found["lm_head"].reason == "ignore: lm_head"
    assert set(quantized(list(found.values()))) == {p.name for p in found.values() if p.scheme}


def test_fused_linears_share_their_fate_and_their_name(four: Checkpoint) -> None:
    by_fused: dict[str, set] = {}
    for plan in plans(four, boundary={"blocks": 1, "keep": "projections"}).values():
        by_fused.setdefault(plan.fused, set()).add(plan.scheme)
    assert all(len(schemes) == 1 for schemes in by_fused.values())


def test_group_size_of_minus_one_is_the_width(four: Checkpoint) -> None:
    found = plans(four, group_size=-1)
    assert found["0.mlp.down_proj"].scheme == Scheme("int4_sym", 256)
    assert found["0.self_attn.q_proj"].scheme == Scheme("int4_sym", 128)


def test_a_group_size_that_does_not_divide_is_an_error_that_helps(odd: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"group_size 64 does not divide the 96 inputs .*--set group_size=32"):
        plans(odd)
    with pytest.raises(UsageError, match="--set indivisible=keep"):
        plans(odd, ignore=("lm_head", "re:.*(self_attn|gate_proj|up_proj).*"))
    assert UsageError("x").exit_code == 2


def test_the_next_smaller_size_or_none(odd: Checkpoint) -> None:
    found = plans(odd, group_size=128, indivisible="keep")
    assert kept(found) == set(found)
    assert "128 does not divide 96" in found["0.self_attn.q_proj"].reason
    found = plans(odd, method="nvfp4", group_size=128, indivisible="smaller")
    assert found["0.self_attn.q_proj"].scheme == Scheme("nvfp4", 32)
    assert found["0.mlp.down_proj"].scheme == Scheme("nvfp4", 16)
    assert "128 does not divide 96" in found["0.self_attn.q_proj"].reason
    with pytest.raises(UsageError, match=r"down_proj.*indivisible=keep"):
        plans(odd, indivisible="smaller")
    with pytest.raises(UsageError, match="group_size=16"):
        plans(odd, method="nvfp4", group_size=32, ignore=("lm_head", "re:.*self_attn.*"))


@pytest.mark.parametrize(("blocks", "whole"), [(0, set()), (1, {"0", "3"}), (2, {"0", "1", "2", "3"})])
def test_boundary_blocks_stay_whole(four: Checkpoint, blocks: int, whole: set[str]) -> None:
    found = plans(four, boundary={"blocks": blocks, "keep": "blocks"})
    assert {n.split(".")[0] for n in kept(found) - {"lm_head"}} == whole
    assert all(found[n].reason == "boundary block" for n in kept(found) - {"lm_head"})


def test_boundary_projections_are_o_and_down(four: Checkpoint) -> None:
    found = plans(four, boundary={"blocks": 1, "keep": "projections"})
    ends = {f"{i}.{n}" for i in (0, 3) for n in ("self_attn.o_proj", "mlp.down_proj")}
    assert kept(found) == ends | {"lm_head"}
    assert kept(plans(four, boundary={"blocks": 2, "keep": "nothing"})) == {"lm_head"}


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("model.layers.1.mlp.down_proj", {"1.mlp.down_proj"}),
        ("model.layers.1.mlp", {"1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"}),
        ("model.layers.2.self_attn.qkv_proj", {f"2.self_attn.{n}" for n in ATTENTION[:3]}),
        ("re:.*o_proj", {f"{i}.self_attn.o_proj" for i in range(4)}),
        (r"re:model\.layers\.[12]\.self_attn\..*", {f"{i}.self_attn.{n}" for i in (1, 2) for n in ATTENTION}),
        ("re:.*\\.(gate|up)_proj", {f"{i}.mlp.{n}_proj" for i in range(4) for n in ("gate", "up")}),
    ],
)
def test_ignore_takes_names_parents_fused_names_and_patterns(four: Checkpoint, entry: str, names: set[str]) -> None:
    found = plans(four, ignore=("lm_head", entry))
    assert kept(found) == names | {"lm_head"}
    assert all(found[n].reason == f"ignore: {entry}" for n in names)


def test_a_parents_name_is_no_prefix(tmp_path: Path) -> None:
    many = Checkpoint(make_tiny("llama", tmp_path, num_hidden_layers=11))
    assert {n.split(".")[0] for n in kept(plans(many, ignore=("lm_head", "model.layers.1")))} == {"1", "lm_head"}


def test_the_members_of_a_group_may_be_named_one_by_one(four: Checkpoint) -> None:
    entries = tuple(f"model.layers.0.self_attn.{n}" for n in ATTENTION[:3])
    assert kept(plans(four, ignore=("lm_head", *entries))) == {f"0.self_attn.{n}" for n in ATTENTION[:3]} | {"lm_head"}


@pytest.mark.parametrize("entry", ["model.layers.0.self_attn.v_proj", "re:.*v_proj", "re:.*(q|k)_proj"])
def test_a_part_of_a_fused_group_is_refused(four: Checkpoint, entry: str) -> None:
    with pytest.raises(UsageError, match="qkv_proj, which vLLM fuses: keep "):
        plans(four, ignore=("lm_head", entry))


@pytest.mark.parametrize("entry", ["model.layers.9.mlp", "down_proj", "re:down_proj", "model.layers.1.mlp.gate"])
def test_an_entry_that_matches_nothing_is_refused(four: Checkpoint, entry: str) -> None:
    with pytest.raises(UsageError, match="matches no linear") as caught:
        plans(four, ignore=("lm_head", entry))
    assert repr(entry) in str(caught.value)


def test_a_pattern_that_is_none_is_refused(four: Checkpoint) -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        plans(four, ignore=("re:(",))


def test_an_entry_may_repeat_what_another_covers(four: Checkpoint) -> None:
    both = ("lm_head", "model.layers.0", "model.layers.0.mlp.down_proj", "re:.*\\.0\\.mlp.*")
    assert kept(plans(four, ignore=both)) == kept(plans(four, ignore=both[:2]))


def test_names_that_are_never_quantized_may_be_ignored(four: Checkpoint) -> None:
    assert kept(plans(four, ignore=("lm_head", "model.embed_tokens", "embed_tokens"))) == {"lm_head"}


def test_lm_head_is_quantized_when_asked_and_untied(four: Checkpoint, odd: Checkpoint) -> None:
    assert plans(four, ignore=())["lm_head"].scheme == Scheme("int4_sym", 64)
    assert plans(four, ignore=())["lm_head"].out_features == 320
    tied = plans(odd, method="nvfp4", group_size=16, ignore=())["lm_head"]
    assert tied.scheme is None and "tied" in tied.reason and tied.out_features == 320
    assert plans(four, boundary={"blocks": 1, "keep": "blocks"}, ignore=())["lm_head"].scheme is not None


def copy(path: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((path / "config.json").read_text())
    return Checkpoint(target)


def test_a_tied_model_that_stores_its_head_all_the_same_stays_tied(odd: Checkpoint, tmp_path: Path) -> None:
    tensors = load_file(odd.path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    head = plans(copy(odd.path, tmp_path, tensors), method="nvfp4", group_size=16, ignore=())["lm_head"]
    assert head.scheme is None and "tied" in head.reason


@pytest.mark.parametrize("change", ["lacks", "I32", "three dimensions"])
def test_a_linear_that_is_no_bf16_matrix_is_refused(odd: Checkpoint, change: str, tmp_path: Path) -> None:
    tensors = load_file(odd.path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = tensors.pop(name)
    if change == "I32":
        tensors[name] = weight.int()
    if change == "three dimensions":
        tensors[name] = weight[None].clone()
    with pytest.raises(HalfbyteError) as caught:
        plans(copy(odd.path, tmp_path, tensors), method="nvfp4", group_size=16)
    assert name in str(caught.value) and "\n" not in str(caught.value)
