"""The platform and vLLM data: complete, coherent, and found by name and version."""

import pytest

from halfbyte.errors import UsageError
from halfbyte.platforms import FormatSupport, facts_for, list_platforms, load_platform, version_tuple
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
    assert list_platforms() == ["cpu", "h100", "mi325x"]


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
    with pytest.raises(UsageError, match=r"did you mean mi325x\? Known: cpu, h100, mi325x"):
        load_platform("mi300x")
    with pytest.raises(UsageError, match="use cpu, h100, mi325x"):
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
    (gptq,) = table.rows_for("gptq")
    assert [round(table.speedup(gptq, c), 2) for c in (1, 16, 256)] == [1.58, 1.50, 1.03]
    (marlin,) = table.rows_for("modelopt", "W4A16_NVFP4")
    assert marlin.kernel == "Marlin" and round(table.speedup(marlin, 256), 2) == 0.62
    assert {row.kernel for row in table.rows_for("modelopt", "NVFP4")} == {"Marlin", "Humming"}
    assert [table.nearest(c) for c in (0, 1, 30, 40, 100, 200, 9999)] == [1, 1, 16, 64, 64, 256, 256]
    assert table.covers("0.26.1") and not table.covers("0.32.0+cpu") and not table.covers("0.25.3")


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
