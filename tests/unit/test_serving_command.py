"""The vLLM command: right flags for each format and platform, and no value that vLLM refuses."""

import json
import shlex

import pytest

from halfbyte.errors import UsageError
from halfbyte.plan.speed import Model
from halfbyte.serving import declared_variant, serve_command


def config_dir(path, quantization=None, **config):
    path.mkdir(exist_ok=True)
    tree = {**config, **({"quantization_config": quantization} if quantization else {})}
    (path / "config.json").write_text(json.dumps(tree))
    return path


def flags(command):
    words = [word for word in command.argv[3:]]
    return {flag: command.value(flag) for flag in words if flag.startswith("--")}


def test_gptq_on_the_h100():
    command = serve_command("out", "gptq", "h100", context=8192, concurrency=64, port=9000)
    assert command.argv[:3] == ["vllm", "serve", "out"]
    assert flags(command) == {
        "--dtype": "bfloat16",
        "--kv-cache-dtype": "fp8",
        "--max-model-len": "8192",
        "--max-num-seqs": "64",
        "--host": "127.0.0.1",
        "--port": "9000",
    }
    assert command.env == {}
    assert any("Machete, FP8 KV cache: 1.18x" in note and "measured, vLLM 0.26.0" in note for note in command.notes)


def test_the_cpu_is_served_eagerly_with_its_variables():
    command = serve_command("out", "gptq", "cpu")
    assert command.env == {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0"}
    assert flags(command)["--enforce-eager"] is None
    assert flags(command)["--kv-cache-dtype"] == "auto"
    assert flags(command)["--max-model-len"] == "2048"


def test_the_cpu_context_and_cache_follow_the_model(tmp_path):
    shape = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 8}
    short = config_dir(tmp_path / "short", max_position_embeddings=512, **shape)
    assert flags(serve_command(short, None, "cpu"))["--max-model-len"] == "512"
    long = config_dir(tmp_path / "long", max_position_embeddings=131072, **shape)
    command = serve_command(long, None, "cpu", context=16384, concurrency=2)
    assert command.env["VLLM_CPU_KVCACHE_SPACE"] == "4"  # 128 KiB a token x 32768 tokens
    assert any("beyond the 512" in note for note in serve_command(short, None, "cpu", context=600).notes)


@pytest.mark.parametrize(
    ("variant", "version", "backend"),
    [
        ("NVFP4", "0.26.0", "humming"),
        ("W4A16_NVFP4", "0.26.0", None),
        (None, "0.26.0", None),
        ("NVFP4", "0.32.0", None),
        ("NVFP4", "0.25.0", None),
    ],
)
def test_the_linear_backend_depends_on_declaration_and_version(variant, version, backend):
    command = serve_command("out", "modelopt", "h100", variant=variant, vllm_version=version, concurrency=64)
    assert command.value("--linear-backend") == backend
    if version != "0.26.0":
        assert any("no speed was measured" in note for note in command.notes)


def test_the_declaration_is_read_from_the_directory(tmp_path):
    flat = config_dir(tmp_path / "flat", {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    assert declared_variant(flat) == "NVFP4"
    assert serve_command(flat, "modelopt", "h100").value("--linear-backend") == "humming"
    nested = config_dir(tmp_path / "nested", {"quant_method": "modelopt"})
    (nested / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A16_NVFP4"}}))
    assert declared_variant(nested) == "W4A16_NVFP4"
    packed = config_dir(tmp_path / "packed", {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})
    with pytest.raises(UsageError, match="cpu cannot load compressed-tensors: vLLM has no CPU kernel"):
        serve_command(packed, "compressed-tensors", "cpu")
    assert declared_variant(tmp_path / "absent") is None


def test_nvfp4_of_compressed_tensors_is_served_in_the_faster_kernel(tmp_path):
    packed = config_dir(tmp_path, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})
    command = serve_command(packed, "compressed-tensors", "h100", concurrency=64)
    assert command.value("--linear-backend") == "humming"
    assert any("1.29x the speed of BF16" in note and "timed in ModelOpt's layout" in note for note in command.notes)
    int4 = config_dir(tmp_path, {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    assert serve_command(int4, "compressed-tensors", "h100", concurrency=64).value("--linear-backend") is None


def test_a_slowdown_is_told():
    command = serve_command("out", "modelopt", "h100", variant="NVFP4", concurrency=256)
    assert any("0.97x" in note and "slower" in note and "1.53x that of Marlin" in note for note in command.notes)


@pytest.mark.parametrize("concurrency", [1, 4, 9, 16, 32, 64, 256])
def test_a_difference_within_the_repeats_does_not_change_the_kernel(concurrency):
    command = serve_command("out", "modelopt", "h100", variant="NVFP4", concurrency=concurrency)
    assert command.value("--linear-backend") == "humming"
    told = " ".join(command.notes)
    at = {4: "1.04x as fast at 1", **dict.fromkeys((9, 16, 32), "1.35x as fast at 64")}.get(concurrency)
    alike = "no measurable difference from Marlin, FP8 KV cache there (noise 18%)"
    level = f"{alike}, {at}" if at else "x that of Marlin"
    assert level in told, told
    assert "Humming (KV cache auto)" in told, "which is not the one that is served"


def test_a_gain_within_noise_is_said_to_be():
    size = Model(8_030_261_248)
    notes = [
        serve_command("out", "modelopt", "h200", variant="NVFP4", concurrency=level, size=size).notes[-1]
        for level in (1, 64)
    ]
    assert "1.33x the speed of BF16 at concurrency 1, no measurable" in notes[0]
    assert "1.08x the speed of BF16 at concurrency 64 (within noise, 11%), 1.35x that of Marlin" in notes[1]


def test_figures_of_a_far_model_are_not_told():
    size = 8_030_261_248
    for near, far in (Model(size), Model(size // 60)), (Model(size, 1), Model(size, 4)):
        known = serve_command("out", "modelopt", "h100", variant="NVFP4", size=near).notes[-1]
        unknown = serve_command("out", "modelopt", "h100", variant="NVFP4", size=far).notes[-1]
        assert "1.29x the speed of BF16" in known and "x the speed" not in unknown
        where = "a model of another size" if far.tp == 1 else "another number of devices"
        assert unknown.startswith(f"kernel Humming, rather than Marlin, FP8 KV cache, by a measurement on {where}")
        assert (
            serve_command("out", "modelopt", "h100", variant="NVFP4", size=far).value("--linear-backend") == "humming"
        )


def test_formats_that_cannot_load_say_why():
    with pytest.raises(UsageError, match="mi325x cannot load modelopt: vLLM has no ROCm kernel"):
        serve_command("out", "modelopt", "mi325x", variant="W4A16_NVFP4")
    assert any("emulation" in n for n in serve_command("out", "modelopt", "mi325x", variant="NVFP4").notes)
    with pytest.raises(UsageError, match="nothing is known of the format gguf"):
        serve_command("out", "gguf", "cpu")
    with pytest.raises(UsageError, match="unknown platform"):
        serve_command("out", "gptq", "b200x")


def test_awq_on_the_mi325x_computes_in_float16():
    assert flags(serve_command("out", "awq", "mi325x"))["--dtype"] == "float16"
    assert flags(serve_command("out", "awq", "mi325x"))["--kv-cache-dtype"] == "auto"


def test_the_users_words_replace_ours():
    extra = ["--kv_cache_dtype=auto", "--no-enforce-eager", "--port", "7000", "--tensor-parallel-size", "2"]
    command = serve_command("out", "gptq", "cpu", port=9000, extra=extra)
    assert command.argv[-len(extra) :] == extra
    assert "--enforce-eager" not in command.argv and "--kv-cache-dtype" not in command.argv
    assert command.argv.count("--port") == 1 and command.value("--port") == "7000"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dtype", "bf16"], "write --dtype bfloat16"),
        (["--dtype=int4"], "does not know --dtype int4: use auto, half"),
        (["--kv-cache-dtype", "bf16"], "write --kv-cache-dtype auto"),
        (["--kv-cache-dtype", "float16"], "silent nonsense"),
    ],
)
def test_values_that_vllm_refuses_or_garbles(extra, message):
    with pytest.raises(UsageError, match=message):
        serve_command("out", "gptq", "h100", extra=extra)
    serve_command("out", "gptq", "h100", extra=["--kv-cache-dtype", "float16", "--dtype", "float16"])


def test_shell_is_the_same_command_in_readable_lines():
    command = serve_command("my runs/a", "gptq", "cpu", extra=["--override", '{"a": -1}', "-tp", "-2"])
    text = command.shell()
    assert text.splitlines()[:3] == [
        "VLLM_CPU_KVCACHE_SPACE=1 \\",
        "VLLM_CPU_INT4_W4A8=0 \\",
        "vllm serve 'my runs/a' \\",
    ]
    assert "  --max-model-len 2048 \\" in text.splitlines() and text.splitlines()[-1] == "  -tp -2"
    words = shlex.split(text.replace("\\\n", ""))
    assert words[2:] == command.argv


def test_an_unknown_vllm_is_told():
    assert any("newer than any seen" in note for note in serve_command("o", "gptq", "cpu", vllm_version="0.99.0").notes)
