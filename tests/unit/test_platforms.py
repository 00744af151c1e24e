"""The platform and vLLM data: complete, coherent, and found by name and version."""

import json

import pytest
import yaml

from halfbyte.errors import UsageError
from halfbyte.platforms import (
    FormatSupport,
    SpeedTable,
    facts_for,
    list_platforms,
    load_evidence,
    load_platform,
    version_tuple,
    versions,
)
from halfbyte.recipe.schema import GROUP_SIZES

FORMATS = {
    "bf16",
    "gptq",
    "awq",
    "modelopt/W4A16_NVFP4",
    "modelopt/NVFP4",
    "compressed-tensors/pack-quantized",
    "compressed-tensors/nvfp4-pack-quantized",
}


def test_platforms_are_listed_without_the_facts():
    assert list_platforms() == ["cpu", "h100", "h200", "mi325x"]


@pytest.mark.parametrize("name", list_platforms())
def test_every_platform_speaks_of_every_format(name):
    platform = load_platform(name)
    assert platform.name == name
    assert set(platform.formats) == FORMATS
    for support in platform.formats.values():
        assert support.evidence.vllm


@pytest.mark.parametrize("name", list_platforms())
def test_no_flag_has_a_value_that_vllm_refuses(name):
    platform = load_platform(name)
    facts = facts_for(platform.vllm)
    assert not facts.notice
    for support in platform.formats.values():
        flags = {**platform.flags, **support.flags}
        assert flags["--dtype"] in facts.dtypes
        assert flags["--kv-cache-dtype"] in facts.kv_cache_dtypes
        assert flags["--kv-cache-dtype"] != "float16"
        assert not {f"{flag} {value}" for flag, value in flags.items()} & set(facts.misnomers)


def test_names_in_any_case_and_a_hint_for_a_wrong_one():
    assert load_platform("H100") is load_platform("h100") or load_platform("H100") == load_platform("h100")
    with pytest.raises(UsageError, match=r"did you mean mi325x\? Known: cpu, h100, h200, mi325x"):
        load_platform("mi300x")
    with pytest.raises(UsageError, match="use cpu, h100, h200, mi325x"):
        load_platform("quux")


def test_what_cannot_load_says_why():
    assert "CPU kernel" in load_platform("cpu").support("modelopt", "NVFP4").reason
    assert not load_platform("mi325x").support("modelopt").loads
    assert not load_platform("mi325x").support("modelopt", "NVFP4").advised
    with pytest.raises(ValueError, match="needs its reason"):
        FormatSupport.model_validate({"loads": False, "evidence": {"kind": "source", "date": "2026-01-01"}})
    with pytest.raises(KeyError):
        load_platform("cpu").support("gguf")


def test_measured_speed_of_the_h100():
    (table,) = load_platform("h100").speed
    assert table.evidence.kind == "measured" and table.evidence.vllm == "0.26.0"
    (gptq,) = table.rows_for("gptq", kv_cache="auto")
    assert [round(table.speedup(gptq, c), 2) for c in (1, 16, 256)] == [1.61, 1.51, 1.09]
    (marlin,) = table.rows_for("modelopt", "W4A16_NVFP4", "auto")
    assert marlin.kernel == "Marlin" and round(table.speedup(marlin, 256), 2) == 0.62
    assert {row.kernel for row in table.rows_for("modelopt", "NVFP4", "auto")} == {"Marlin", "Humming"}
    assert [table.nearest(c) for c in (0, 1, 30, 40, 90, 200, 9999)] == [1, 1, 16, 64, 64, 256, 256]
    assert table.covers("0.26.1") and not table.covers("0.32.0+cpu") and not table.covers("0.25.3")


def test_a_kernel_not_measured_with_that_kv_cache_is_not_left_out():
    (table,) = load_platform("h100").speed
    assert [row.kernel for row in table.rows_for("gptq", kv_cache="fp8")] == ["Machete, FP8 KV cache"]
    assert [row.kernel for row in table.rows_for("modelopt", "NVFP4", "fp8")] == ["Humming", "Marlin, FP8 KV cache"]
    assert len(table.rows_for("modelopt", "NVFP4")) == 3


def test_nvfp4_in_either_layout_has_the_same_kernels():
    h100, declared = load_platform("h100"), ("compressed-tensors", "nvfp4-pack-quantized")
    assert {h100.support("compressed-tensors", v).evidence.kind for v in ("pack-quantized", declared[1])} == {
        "measured"
    }
    (table,) = h100.speed
    for kv_cache in ("auto", "fp8"):
        ours, theirs = table.rows_for(*declared, kv_cache), table.rows_for("modelopt", "NVFP4", kv_cache)
        assert [(r.kernel, r.flags, r.seconds) for r in ours] == [(r.kernel, r.flags, r.seconds) for r in theirs]
        assert all("timed in ModelOpt's layout" in row.note for row in ours)
        assert all(h100.roofline.efficiency(r.format, r.kernel) != h100.roofline.four_bit for r in ours)
    assert table.rows_for("compressed-tensors", "pack-quantized") == ()


def test_a_knob_may_name_the_declaration():
    (knob, later, int4, *_) = load_platform("h100").tune
    for variant, tried in (("NVFP4", True), ("W4A16_NVFP4", False), (None, True)):
        assert knob.matters("modelopt", "0.26.0", variant) == tried
    assert knob.matters("compressed-tensors", "0.26.0", "nvfp4-pack-quantized")
    assert not knob.matters("compressed-tensors", "0.26.0", "pack-quantized")
    assert not knob.matters("modelopt", "0.32.0", "NVFP4") and not knob.matters("gptq", "0.26.0")
    assert later.matters("modelopt", "0.32.0", "W4A16_NVFP4") and int4.matters("gptq", "0.32.0")
    assert not int4.matters("compressed-tensors", "0.32.0", "nvfp4-pack-quantized"), "Machete takes no NVFP4"
    (servers,) = (knob for knob in load_platform("h100").tune if knob.flag == "--api-server-count")
    tried = [servers.matters("gptq", "0.26.0", None, level) for level in (None, 1, 127, 128)]
    assert tried == [True, False, False, True], "one process of the host is enough for few sequences"


def kernels(apart, *rows):
    """Evidence in which BF16 takes a second at 1, 16 and 64 and each kernel what its row says."""
    measured = [
        {
            "kernel": name,
            "format": "modelopt",
            "weights_gib": 1,
            "seconds": dict(zip((1, 16, 64), seconds)),
            "flags": flags,
        }
        for name, seconds, flags in [("BF16", (1, 1, 1), {}), *rows]
    ]
    measured[0]["format"] = "bf16"
    return SpeedTable.model_validate({**yaml.safe_load(OWN), "rows": measured, "apart": apart})


def test_kernels_that_repeats_do_not_tell_apart_are_told_by_the_next_concurrency():
    flag = {"--linear-backend": "humming"}
    two = ("Humming", (0.5, 0.65, 0.6), flag), ("Marlin", (0.51, 0.6, 0.9), {})
    for apart, at, fastest in (
        ({}, 16, "Marlin"),
        ({16: 0.05}, 16, "Marlin"),
        ({16: 0.1}, 16, "Humming"),  # at 1 it is ahead, beyond doubt
        ({1: 0.1, 16: 0.1}, 16, "Humming"),  # at 64 it is
        ({1: 0.1, 16: 0.1}, 1, "Humming"),
        ({1: 0.1, 16: 0.1, 64: 9.0}, 16, "Marlin"),  # nowhere: by the median
    ):
        table = kernels(apart, *two)
        assert table.fastest(table.rows_for("modelopt"), at).kernel == fastest, (apart, at)


def test_the_kv_cache_is_no_flag_of_a_kernel():
    flags = {"--linear-backend": "humming", "--kv-cache-dtype": "fp8"}
    table = kernels({}, ("Humming", (0.5, 0.6, 0.6), flags), ("BF16, FP8", (1, 1, 1), {"--kv-cache-dtype": "fp8"}))
    (row,) = table.rows_for("modelopt", kv_cache="auto")[:1]
    assert row.flags == {"--linear-backend": "humming"} and row.kv_cache == "fp8" and row.all_flags == flags
    with pytest.raises(ValueError, match="once for a KV cache"):
        SpeedTable.model_validate({**table.model_dump(by_alias=True), "rows": [table.rows[0], *table.rows]})


@pytest.mark.parametrize(
    ("version", "torch"),
    [("0.20.0", "2.11"), ("0.26.0", "2.11"), ("0.27.0rc1", "2.13"), ("0.32.0+cpu", "2.13"), ("0.33.1", "2.14")],
)
def test_torch_pairs_with_the_version(version, torch):
    facts = facts_for(version)
    assert facts.torch == torch and not facts.notice


def test_versions_outside_every_range_say_so():
    assert "older than any seen" in facts_for("0.9.2").notice
    assert "newer than any seen" in facts_for("1.0").notice
    assert facts_for("1.0").torch == "2.14"
    assert facts_for(None).seen == {"0.32.0": "measured on CPU"}
    with pytest.raises(UsageError, match="no vLLM version"):
        facts_for("latest")


def test_quirks_follow_the_version():
    def ids(version):
        return {quirk.id for quirk in facts_for(version).quirks}

    assert {"w4a16-nvfp4-is-marlin", "tied-modelopt"} <= ids("0.24.0")
    assert "tied-modelopt" not in ids("0.26.0") and "w4a16-nvfp4-is-marlin" in ids("0.26.0")
    assert "w4a16-nvfp4-is-marlin" not in ids("0.32.0") and "nvfp4-flat-config" in ids("0.32.0")


def test_recipes_ask_only_for_groups_that_the_loaders_take():
    formats = facts_for().formats
    assert formats["gptq"].group_sizes == GROUP_SIZES["int4_sym"]
    assert formats["awq"].group_sizes == GROUP_SIZES["int4_asym"]
    assert formats["modelopt"].group_sizes == (16,)


def test_version_tuple():
    assert version_tuple("0.32.0+cpu") == (0, 32, 0)
    assert version_tuple("v0.26") == (0, 26, 0)
    with pytest.raises(ValueError, match="no version"):
        version_tuple("main")


OWN = """
schema: 1
kind: speed
measured: true
device: h100
vllm: 0.26.1
date: 2027-01-02
model: {name: mine, parameters: 8000000000}
prompt_tokens: 128
output_tokens: 128
rows:
  - {kernel: BF16, format: bf16, weights_gib: 15, seconds: {1: 1.0, 64: 1.0}}
  - {kernel: Machete, format: gptq, weights_gib: 5, seconds: {1: 0.5, 64: 0.5}}
  - {kernel: Marlin, format: modelopt, weights_gib: 5, seconds: {1: 0.9, 64: 0.9}}
"""


def test_the_users_evidence_comes_first_when_it_is_newer(tmp_path):
    (tmp_path / "a.yaml").write_text(OWN)
    (tmp_path / "b.json").write_text(json.dumps(yaml.safe_load(OWN.replace("2027", "2020")), default=str))
    (tmp_path / "notes.txt").write_text("not evidence")
    dates = [str(table.date) for table in load_platform("h100", [tmp_path]).speed]
    assert dates == ["2027-01-02", "2026-11-25", "2020-01-02"]
    assert len(load_platform("h100", [tmp_path / "a.yaml"]).speed) == 2
    assert load_platform("mi325x", [tmp_path]).speed == ()
    assert load_evidence([tmp_path / "nowhere"]) == load_evidence() != ()
    (table,) = [t for t in load_evidence([tmp_path]) if t.model.name == "mine" and t.date.year == 2027]
    assert (table.since, table.before) == ("0.26", "0.27") and table.covers("0.26.9") and not table.covers("0.27")
    assert SpeedTable.model_validate(json.loads(table.model_dump_json(by_alias=True))) == table


def test_the_users_evidence_changes_the_choice(tmp_path):
    from halfbyte.plan import choose

    (tmp_path / "a.yaml").write_text(OWN)
    assert choose([4096], [load_platform("h100")], [64]).recipe.method == "nvfp4"
    decision = choose([4096], [load_platform("h100", [tmp_path])], [64])
    assert decision.recipe.method == "gptq" and "2.00x" in decision.reasons[0].text


@pytest.mark.parametrize(
    "change, says",
    [
        (("measured: true", "measured: false"), "measured"),
        (("seconds: {1: 0.5, 64: 0.5}", "seconds: {1: 0.5}"), "not measured at the concurrencies of the baseline"),
        (("format: bf16", "format: awq"), "bf16 without flags, once"),
        (("0.5, 64", "-1, 64"), "all above 0"),
        (("date:", "apart: {1: -0.1}\ndate:"), "a share, 0 and more"),
        (("device: h100", "device: h100\nspeed: fast"), "speed"),
        (("vllm: 0.26.1", 'vllm: 0.26.1\nsince: "0.30"'), "lies outside"),
        (("kind: speed", "kind: [speed"), "not valid YAML or JSON"),
        (("kind: speed", "kind: bench"), "it is no evidence file, which says kind: speed$"),
        (("vllm: 0.26.1", "vllm: newest"), "no version"),
    ],
)
def test_broken_evidence_is_one_line(tmp_path, change, says):
    (tmp_path / "a.yaml").write_text(OWN.replace(*change))
    with pytest.raises(UsageError, match=says) as raised:
        load_evidence([tmp_path])
    assert "a.yaml" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="cannot be read"):
        load_evidence([tmp_path / "missing.yaml"])


def test_a_platform_of_the_users_own(tmp_path):
    from halfbyte.plan import choose

    file = tmp_path / "mine.yaml"
    file.write_text("like: h100\nname: mine\nmemory_gib: 141\nbandwidth_gbs: 4800\ncapabilities: {fp4_gemm: true}\n")
    mine, base = load_platform(str(file)), load_platform("h100")
    assert (mine.name, mine.memory_gib, mine.capabilities.fp4_gemm) == ("mine", 141, True)
    assert mine.formats.keys() == base.formats.keys() and mine.capabilities.fp8_kv and mine.speed == ()
    (claim, other) = (platform.support("gptq").evidence for platform in (mine, base))
    assert claim == other.model_copy(update={"device": "h100"}) and str(claim).startswith("measured on h100, vLLM ")
    assert mine.hardware.device == "" and mine.hardware.kind == "source", "a data sheet is of no machine"
    for version, activations in (("0.26.0", "fp4"), ("0.32.0", "bf16")):
        one = mine.model_copy(update={"vllm": version})
        assert choose([4096], [one], [64]).recipe.activations == activations, "what the data warns of is not declared"
    file.write_text("like: h100\nname: mine\nbandwith_gbs: 1\n")
    with pytest.raises(UsageError, match="bandwith_gbs"):
        load_platform(str(file))
    with pytest.raises(UsageError, match=r"nowhere.yaml cannot be read"):
        load_platform(str(tmp_path / "nowhere.yaml"))
    file.write_text("like: h99\nname: mine\n")
    with pytest.raises(UsageError, match="unknown platform 'h99'"):
        load_platform(str(file))


def test_kernels_follow_the_version():
    support = load_platform("h100").support("gptq")
    assert [k.name for k in support.kernels_in("0.26.0")] == ["Machete", "Marlin"]
    assert [k.name for k in support.kernels_in("0.32.0")] == ["Machete", "Humming"]
    machete = support.kernels[0]
    assert machete.refuses(4096, 4096, 128, "bfloat16") == ""
    assert "groups of 32" in machete.refuses(4096, 4096, 32, "bfloat16")
    assert "96 inputs" in machete.refuses(96, 128, -1, "bfloat16")
    exllama = load_platform("mi325x").support("gptq").kernels[-1]
    assert "bfloat16" in exllama.refuses(64, 64, 64, "bfloat16")


def test_ranges_in_words():
    assert versions("0.0.0", "0.32.0") == "vLLM before 0.32.0"
    assert versions("0.27.0", "999.0.0") == "vLLM 0.27.0 and later"
    assert facts_for("0.26.0").quirks[0].source.startswith("vLLM fact tied-lm-head, every vLLM seen")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("like: h100\n", r"give it a name of its own \(it has none\): name: my-gpu"),
        ("like: h100\nname: H100\n", r"give it a name of its own \(H100 is one that there is data for\)"),
        ("like: h100\nname: mine\nranked_by: h101\n", r"ranked_by: unknown platform 'h101': did you mean h100\?"),
        ("like: h101\nname: mine\n", r"like: unknown platform 'h101': did you mean h100\?"),
        ("like: h100\nname: mine\nmemory_gib: -3\n", r"memory_gib: Input should be greater than 0"),
        ("like: h100\nname: mine\nbandwidth_gbs: 0\n", r"bandwidth_gbs: Input should be greater than 0"),
    ],
)
def test_a_platform_of_the_users_own_that_cannot_be(tmp_path, text, told):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=told):
        load_platform(str(file))


def test_evidence_that_says_nothing_of_a_platform_is_named(tmp_path):
    from halfbyte.platforms.evidence import unused

    tree = load_platform("h100").speed[0].model_dump(mode="json", by_alias=True)
    for device in ("h100", "h100z"):
        (tmp_path / f"{device}.json").write_text(json.dumps({**tree, "device": device}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "alike.yaml").write_text("like: h100\nname: mine\nranked_by: h100\n")
    h100, cpu, h200, mine = (load_platform(name) for name in ("h100", "cpu", "h200", str(tmp_path / "alike.yaml")))
    (tmp_path / "alike.yaml").unlink()
    other = f"evidence {tmp_path / 'h100z.json'} is of h100z, not of"
    assert unused([tmp_path], [h100]) == [f"{other} h100: it is not used"]
    assert unused([tmp_path / "h100.json"], [mine]) == [], "it ranks kernels there"
    assert unused([tmp_path / "h100.json"], [h200]) != [], "the H200 has figures of its own"
    assert unused([tmp_path], [cpu, h100]) == [f"{other} cpu or h100: it is not used"]
    newer = h100.model_copy(update={"vllm": "0.33.0"})
    (told,) = unused([tmp_path / "h100.json"], [newer, cpu], " (do so)")
    assert told.endswith("is of vLLM 0.26.0, and this speaks of 0.33.0: it is not used (do so)")
    assert unused([tmp_path / "empty"], [cpu]) == [f"evidence {tmp_path / 'empty'} holds no file (.yaml, .yml, .json)"]
