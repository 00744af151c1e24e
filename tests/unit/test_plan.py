"""The plan: bytes from headers alone equal what formats write, the choice of a recipe, memory, notices, text."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import halfbyte.plan
from halfbyte.errors import UsageError
from halfbyte.formats import get_format
from halfbyte.models import Checkpoint
from halfbyte.plan import assign, choose, make_plan, open_for_plan, render_plan, spell, variant_of
from halfbyte.platforms import list_platforms, load_platform
from halfbyte.recipe import load_recipe
from halfbyte.recipe.schema import Recipe
from halfbyte.types import QuantizedLinear
from tests.tiny import FAMILIES, make_tiny

CPU, H100, MI325X = (load_platform(name) for name in ("cpu", "h100", "mi325x"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    made = {}

    def get(family, **overrides):
        key = (family, *sorted(overrides.items()))
        if key not in made:
            made[key] = Checkpoint(make_tiny(family, tmp_path_factory.mktemp(family), **overrides))
        return made[key]

    return get


def plan_of(checkpoint, recipe=None, platforms=(CPU,), **others):
    return make_plan(checkpoint, recipe, platforms, **others)


def told(entries):
    """Texts of reasons or warnings in one line; each must name its rule and its source."""
    assert all(entry["rule"] and entry["source"] for entry in entries)
    return " ".join(entry["text"] for entry in entries)


def recipe_of(**keys):
    return Recipe.model_validate(keys)


def pack(plan, recipe):
    """A random linear of that plan, as the format writes it."""
    groups = plan.in_features // plan.scheme.group_size
    shape = (plan.out_features, groups)
    q = QuantizedLinear(
        codes=torch.randint(0, 16, (plan.out_features, plan.in_features), dtype=torch.uint8),
        scales=torch.ones(shape),
        group_size=plan.scheme.group_size,
        grid=plan.scheme.grid,
        zeros=torch.full(shape, 8, dtype=torch.uint8) if plan.scheme.grid == "int4_asym" else None,
        global_scale=1.0 if plan.scheme.grid == "nvfp4" else None,
    )
    return get_format(recipe.format).pack(plan.name, q)


@pytest.mark.parametrize("concurrency", [1, 4, 9, 16, 32, 64])
def test_what_repeats_do_not_tell_apart_decides_nothing(concurrency):
    """At 4 and 16 Marlin and GPTQ are a few percent ahead of Humming, or behind it, and repeats 18 % apart."""
    recipe = choose([4096], [load_platform("h100")], [concurrency]).recipe
    assert (recipe.method, recipe.activations) == ("nvfp4", "fp4")


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "gptq", "group_size": 64},
        {"method": "gptq", "group_size": 128, "boundary": {"blocks": 1, "keep": "projections"}},
        {"method": "gptq", "group_size": -1, "ignore": []},
        {"method": "gptq", "group_size": 32, "format": "compressed-tensors"},
        {"method": "awq", "group_size": 64},
        {"method": "nvfp4", "group_size": 16},
        {"method": "nvfp4", "group_size": 64},
    ],
)
def test_bytes_equal_what_the_format_writes(tiny, keys):
    checkpoint, recipe = tiny("mistral"), recipe_of(**keys)
    plans = assign(recipe, checkpoint)
    written = sum(t.nbytes for p in plans if p.scheme for t in pack(p, recipe).values())
    gone = {f"{p.name}.weight" for p in plans if p.scheme}
    kept = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in gone)
    sizes = plan_of(checkpoint, recipe)["bytes"]
    assert sizes["quantized_linears"] == written
    assert sizes["after"] == written + kept
    assert sizes["before"] == checkpoint.total_bytes
    rows = plan_of(checkpoint, recipe)["linears"]
    assert sum(row["bytes_after"] for row in rows) + sizes["other_tensors"] == sizes["after"]


def test_scales_are_counted_in_the_bits(tiny):
    plan = plan_of(tiny("llama"), recipe_of(method="nvfp4", group_size=16, ignore=["lm_head"]))
    assert plan["bytes"]["bits_per_quantized_weight"] == pytest.approx(4.5, abs=0.01)
    wide = plan_of(tiny("llama"), recipe_of(method="gptq", group_size=32))["bytes"]["bits_per_quantized_weight"]
    narrow = plan_of(tiny("llama"), recipe_of(method="gptq", group_size=128))["bytes"]["bits_per_quantized_weight"]
    assert 4 < narrow < wide


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_plans_and_renders(tiny, family):
    checkpoint = tiny(family)
    plan = plan_of(checkpoint, platforms=(CPU, H100))
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    blocks = [row for row in plan["linears"] if row["kind"] != "lm_head"]
    assert sum(row["count"] for row in blocks) == sum(1 for p in assign(Recipe(), checkpoint) if p.block is not None)
    assert plan["title"] in render_plan(plan)


def test_a_group_size_that_does_not_divide(tiny):
    narrow = tiny("llama", hidden_size=192, intermediate_size=384)
    plan = plan_of(narrow)
    assert plan["recipe"]["group_size"] == 64
    assert "128 does not divide 192" in told(plan["reasons"])
    given = plan_of(narrow, load_recipe("B1"))
    rows = {row["in_features"]: row for row in given["group_sizes"]}
    assert rows[192]["used"] == [64] and rows[192]["text"] == "128 does not divide 192: 64 is used"
    assert rows[192]["divides"] == [32, 64] and rows[192]["does_not_divide"] == [128]
    assert rows[384]["used"] == [128]
    assert "128 does not divide 192: 64 is used" in render_plan(given)
    with pytest.raises(UsageError, match="does not divide"):
        plan_of(narrow, recipe_of(method="gptq", group_size=128))


def test_exemptions_say_what_they_cost(tiny):
    checkpoint = tiny("mistral", num_hidden_layers=4)
    bare = plan_of(checkpoint, recipe_of(method="gptq", group_size=64, ignore=[]))
    kept = plan_of(checkpoint, recipe_of(method="gptq", group_size=64, boundary={"blocks": 1, "keep": "blocks"}))
    added = {row["reason"]: row["bytes_added"] for row in kept["exemptions"]}
    assert set(added) == {"boundary block", "ignore: lm_head"} and min(added.values()) > 0
    assert kept["bytes"]["after"] - bare["bytes"]["after"] == sum(added.values())


def test_a_tied_head_adds_nothing(tiny):
    plan = plan_of(tiny("llama"))
    (row,) = [row for row in plan["exemptions"] if row["names"] == ["lm_head"]]
    assert row["bytes_added"] == 0
    assert any("tied" in notice for notice in plan["notices"])


PINNED = "NVFP4 declared as weight-only (W4A16_NVFP4)"


@pytest.mark.parametrize(
    "platforms, concurrency, method, avoided",
    [
        ([CPU], 8, "gptq", {"NVFP4"}),
        ([H100, MI325X], 64, "gptq", {"NVFP4", "AWQ in bfloat16"}),
        ([H100], 1, "nvfp4", {PINNED}),
        ([H100], 64, "nvfp4", {PINNED}),
        ([H100], 256, "gptq", {PINNED}),
        ([], 64, "gptq", set()),
    ],
)
def test_the_choice(platforms, concurrency, method, avoided):
    decision = choose([576, 1536], platforms, [concurrency])
    assert decision.recipe.method == method
    assert decision.recipe.group_size == (16 if method == "nvfp4" else 64)
    assert {entry["title"].split(",")[0] for entry in decision.avoided} == avoided
    assert decision.reasons and all(entry["reason"] for entry in decision.avoided + decision.alternatives)


@pytest.mark.parametrize("widths, group", [([128, 256], 128), ([576, 1536], 64), ([96, 256], 32)])
def test_the_largest_group_that_divides_everything(widths, group):
    assert choose(widths, [CPU], [8]).recipe.group_size == group


def test_widths_that_no_group_divides_stay_in_bf16():
    decision = choose([128, 40], [CPU], [8])
    assert (decision.recipe.group_size, decision.recipe.indivisible) == (32, "keep")
    assert "40 inputs stay in BF16" in " ".join(reason.text for reason in decision.reasons)
    assert choose([128, 40], [H100], [8]).recipe.method == "gptq"


def test_nvfp4_on_h100_shows_both_kernels_and_its_alternative(tiny):
    plan = plan_of(tiny("llama"), platforms=[H100], concurrency=64)
    assert plan["recipe"]["activations"] == "fp4"
    rows = plan["speed"][0]["rows"]
    assert {row["kernel"].partition(",")[0] for row in rows} == {"Humming", "Marlin", "Machete"}
    (row,) = plan["strategy"]["disagreements"]
    assert not row["near"] and row["strategy"]["gain"] is row["evidence"][0]["gain"] is None, "of another size"
    assert "by a measurement on a model of another size" in row["text"] and "x" not in row["do"].split("humming")[0]
    assert any("--linear-backend humming" in notice and "Marlin" in notice for notice in plan["notices"])
    assert {entry["recipe"]["method"] for entry in plan["alternatives"]} == {"gptq", "awq"}


def test_notices_on_shared_scales_and_platforms_that_cannot(tiny):
    plan = plan_of(tiny("llama"), load_recipe("A1"), [CPU, MI325X])
    text = " ".join(plan["notices"])
    assert "group 64 gives 4 neighbouring blocks" in text and "no bytes" in text
    assert "do not serve this on cpu" in text and "do not serve this on mi325x" in text
    assert "--dtype bf16 as bfloat16" in text
    native = plan_of(tiny("llama"), load_recipe("A1-G16"), [H100])
    assert "neighbouring blocks" not in " ".join(native["notices"])
    assert native["bytes"]["after"] == plan["bytes"]["after"]


def test_a_kernel_that_wants_other_multiples_is_told(tiny):
    odd = tiny("llama", intermediate_size=272)
    recipe = recipe_of(method="gptq", group_size=-1)
    text = told(plan_of(odd, recipe, [CPU])["warnings"])
    assert "multiples of 32" in text and "down_proj" in text


def test_no_text_means_self_generated(tiny):
    def warned(recipe, given):
        return "writes its own" in told(plan_of(tiny("llama"), recipe, text_given=given)["warnings"])

    assert warned(recipe_of(method="gptq"), False)
    assert not warned(recipe_of(method="gptq"), True)
    assert not warned(recipe_of(method="rtn"), False)


def test_commands_come_from_above(tiny):
    def command(recipe, platform):
        if platform.name == "cpu":
            raise UsageError("it will not do")
        return f"serve {recipe.format}/{variant_of(recipe)} on {platform.name}"

    plan = plan_of(tiny("llama"), recipe_of(method="gptq"), [CPU, H100], commands=command)
    assert plan["commands"] == {"h100": "serve gptq/None on h100"}
    assert "no serve command for cpu: it will not do" in plan["notices"]
    assert "serve gptq/None on h100" in render_plan(plan)
    assert plan_of(tiny("llama"), commands={"cpu": "x"})["commands"] == {"cpu": "x"}


def test_memory_follows_the_platform_and_the_request(tiny):
    plan = plan_of(tiny("llama"), platforms=[H100, MI325X, CPU], context=200, concurrency=3)
    kinds = {row["platform"]: row["kv_cache_dtype"] for row in plan["memory"]}
    assert kinds == {"h100": "fp8", "mi325x": "auto", "cpu": "auto"}
    assert all((row["context"], row["concurrency"]) == (200, 3) for row in plan["memory"])
    by_name = {row["platform"]: row for row in plan["memory"]}
    assert by_name["h100"]["kv_bytes"] * 2 == by_name["mi325x"]["kv_bytes"]
    assert by_name["h100"]["fits"] and by_name["cpu"]["fits"] is None
    assert any("beyond the 256" in n for n in plan_of(tiny("llama"), context=512)["notices"])


def test_text_stays_within_the_terminal(tiny):
    for family in ("phi3", "llama"):
        text = render_plan(plan_of(tiny(family), platforms=[H100, MI325X, CPU], concurrency=[1, 16, 64]), explain=True)
        body = text.split("\n", 1)[1]
        assert max(map(len, body.splitlines())) <= 80
        assert "Kept in BF16" in text and "Memory (estimate)" in text and "Where the figures come from" in text


def test_the_verdict_comes_first(tiny):
    plan = plan_of(tiny("llama"), platforms=[H100], concurrency=[1, 64], gates={"ppl": 0.05})
    first = render_plan(plan).partition("\n\nWhy")[0]
    assert plan["title"] in first and "fits:" in first and "(roofline)" in first and "budget ppl 0.05" in first
    as_written = render_plan(plan, budget=["ppl=+5%", "top1=90%"])
    assert "budget ppl=+5%, top1=90%:" in as_written.partition("\n\nWhy")[0]
    assert "overhead" in as_written and "overhead" not in render_plan(plan_of(tiny("llama"), platforms=[CPU]))
    assert "rule; " not in render_plan(plan) and "[kernel-flag;" in render_plan(plan, explain=True)


def test_a_tight_budget_protects_the_boundary(tiny):
    loose, tight = (plan_of(tiny("mistral"), platforms=[CPU], gates={"ppl": limit}) for limit in (0.05, 0.01))
    assert (loose["recipe"]["group_size"], loose["recipe"]["boundary"]["keep"]) == (128, "nothing")
    assert (tight["recipe"]["group_size"], tight["recipe"]["boundary"]["keep"]) == (64, "projections")
    assert "+1.0% of perplexity is tight" in told(tight["reasons"])
    assert tight["request"]["gates"] == {"ppl": 0.01}
    assert plan_of(tiny("mistral"))["recipe"] == loose["recipe"]


def test_linears_that_the_first_kernel_refuses_are_told(tiny):
    plan = plan_of(tiny("llama", hidden_size=192, intermediate_size=384), load_recipe("B3"), [H100])
    (text,) = [w["text"] for w in plan["warnings"] if w["rule"] == "fall-back" and "o_proj" in w["text"]]
    assert "fall back from Machete to Marlin (192 outputs are no multiple of 128)" in text
    small = plan_of(tiny("llama"), recipe_of(method="gptq", group_size=32), [H100])
    assert "groups of 32" in told([w for w in small["warnings"] if w["rule"] == "fall-back"])
    later = H100.model_copy(update={"vllm": "0.32.0"})
    assert "to Humming" in told(plan_of(tiny("llama"), recipe_of(method="gptq", group_size=32), [later])["warnings"])
    assert not [
        w for w in plan_of(tiny("llama"), recipe_of(method="gptq"), [MI325X])["warnings"] if "fall back" in w["text"]
    ]


def test_exempting_too_much_is_told(tiny):
    rules = {w["rule"] for w in plan_of(tiny("mistral"), load_recipe("B2"))["warnings"]}
    assert "over-exemption" in rules
    assert "over-exemption" not in {w["rule"] for w in plan_of(tiny("mistral"), load_recipe("B1"))["warnings"]}


def test_long_context_and_an_fp8_cache(tiny):
    long = tiny("llama", max_position_embeddings=32768)
    rules = [
        w["text"]
        for w in plan_of(long, platforms=[H100, MI325X], context=32768)["warnings"]
        if w["rule"] == "long-context"
    ]
    assert len(rules) == 1 and rules[0].startswith("h100")


def test_pins_and_kv_cache_name_their_sources(tiny):
    plan = plan_of(tiny("llama"), platforms=[H100, MI325X, CPU])
    assert [(p["platform"], p["vllm"], p["torch"]) for p in plan["pins"]] == [
        ("h100", "0.26.0", "2.11"), ("mi325x", "0.32.0", "2.13"), ("cpu", "0.32.0", "2.13")]  # fmt: skip
    assert [row["kv_cache_dtype"] for row in plan["kv_cache"]] == ["fp8", "auto", "auto"]
    assert all(row["source"] for row in (*plan["kv_cache"], *plan["pins"], *plan["facts"], *plan["avoided"]))


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "gptq"},
        {"method": "nvfp4", "group_size": 16, "activations": "fp4"},
        {"method": "awq", "group_size": 64, "boundary": {"keep": "projections"}, "indivisible": "keep"},
        {"method": "gptq", "ignore": ["lm_head", "re:.*o_proj"], "calibration": {"seed": 7}},
    ],
)
def test_the_words_of_a_recipe_make_it_again(keys):
    recipe = recipe_of(**keys)
    _, name, *words = spell(recipe)
    assert load_recipe(name, words[1::2]).identity() == recipe.identity()


def test_no_rule_asks_for_a_platforms_name():
    names = set(list_platforms())
    for file in (Path(halfbyte.plan.__file__).parent).glob("*.py"):
        constants = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
        assert not names & {c for c in constants if isinstance(c, str)}, file.name
    twin = H100.model_copy(update={"name": "twin"})
    assert choose([128], [twin], [64]).recipe == choose([128], [H100], [64]).recipe


def test_a_hub_model_is_planned_from_its_headers(tiny, monkeypatch):
    import huggingface_hub

    path = tiny("llama").path
    headers = {
        info.file.name: SimpleNamespace(tensors={n: tensor(i) for n, i in tiny("llama").tensors.items()})
        for info in tiny("llama").tensors.values()
    }
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(path / name))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, repo: SimpleNamespace(files_metadata=headers)
    )
    remote = open_for_plan("org/model", lambda: pytest.fail("nothing is downloaded"))
    assert plan_of(remote)["bytes"] == plan_of(tiny("llama"))["bytes"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("offline")))
    assert open_for_plan("org/model", lambda: path).path == path


def tensor(info):
    return SimpleNamespace(dtype=info.dtype, shape=list(info.shape), data_offsets=(0, info.nbytes))
