"""Bad input is one line that says what to do, and leaves nothing behind."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte.errors import HalfbyteError
from tests.tiny import make_tiny
from tests.unit.artifacts import random_set


def test_not_a_model_directory(refused: Any, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    for words in (["plan", "{}", "--on", "h100"], ["quantize", "{}", "-r", "B1", "-o", str(out)],
                  ["run", "{}", "--on", "cpu", "-o", str(tmp_path / "run")]):  # fmt: skip
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        for name, says in ((tmp_path / "nowhere", "is no directory"), (empty, "is not a model directory"),
                           (model / "config.json", "is a file: name the model's directory")):  # fmt: skip
            assert says in refused(2, *(word.format(name) for word in words))
    assert not out.exists() and not (tmp_path / "run").exists()


def test_a_truncated_and_a_missing_shard(refused: Any, tmp_path: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    network.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    words = ["quantize", tmp_path / "m", "-r", "B3", "--set", "method=rtn", "-o", tmp_path / "out"]
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    line = refused(1, *words)
    assert shard.name in line and "is truncated" in line
    assert shard.name in refused(1, "plan", tmp_path / "m", "--on", "cpu")
    shard.unlink()
    line = refused(1, *words)
    assert shard.name in line and "lacks" in line
    assert shard.name in refused(1, "plan", tmp_path / "m", "--on", "cpu")
    shutil.rmtree(tmp_path / "m")
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(2, *words)


def test_wrong_recipes(refused: Any, tmp_path: Path, model: Path) -> None:
    def line(*words: object) -> str:
        return refused(2, "quantize", model, "-o", tmp_path / "out", *words)

    assert "did you mean 'group_size'?" in line("-r", "B1", "--set", "group_sise=64")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: gptq\nboundry: {blocks: 1}\n")
    assert "unknown recipe key 'boundry': did you mean 'boundary'?" in line("-r", recipe)
    recipe.write_text("method: [gptq\n")
    assert "not valid YAML" in line("-r", recipe)
    assert "does not exist" in line("-r", tmp_path / "none.yaml")
    assert "there is no recipe 'b7'" in line("-r", "b7")
    assert "none that vLLM accepts" in line("-r", "B1", "--set", "group_size=48")
    assert "write key=value" in line("-r", "B1", "--set", "group_size")
    assert "name one with -r" in refused(2, "plan", model, "--on", "h100", "--set", "group_size=64")


def test_a_group_size_that_does_not_divide(refused: Any, tmp_path: Path) -> None:
    odd = make_tiny("llama", tmp_path / "odd", intermediate_size=160)
    words = ["quantize", odd, "-r", "B1", "--set", "indivisible=error", "-o", tmp_path / "out"]
    line = refused(2, *words)
    assert "group_size 128 does not divide the 160 inputs of model.layers.0.mlp.down_proj" in line
    assert line.endswith("--set group_size=32, or --set indivisible=smaller"), "it should name what would work"
    assert "--set group_size=32" in refused(2, "run", odd, "--on", "cpu", *words[2:-1], tmp_path / "deep" / "run")
    assert not (tmp_path / "out").exists() and not (tmp_path / "deep").exists()


def test_too_few_calibration_tokens(refused: Any, tmp_path: Path, model: Path) -> None:
    few = random_set(tokens=500).save(tmp_path / "few")
    words = ["quantize", model, "-r", "B1", "-o", tmp_path / "out", "--calibration"]
    assert "500 tokens: 2,048 are the least" in refused(1, *words, few)
    text = tmp_path / "short.txt"
    text.write_text("Hello.\n\n" * 10)
    refused(1, *words, text)
    line = refused(1, "calibrate", "-m", model, text, "-o", tmp_path / "out")
    assert "--sequences" in line
    line = refused(1, "run", model, "--on", "cpu", "--text", text, "-o", tmp_path / "out")
    assert "--set calibration.sequences=" in line
    assert not (tmp_path / "out").exists(), "a refusal left its directory behind"
    assert "does not exist" in refused(2, *words, tmp_path / "none.txt")
    assert "no manifest.json" in refused(2, *words, tmp_path)
    (few / "tokens.safetensors").write_bytes(b"x")
    assert "broken calibration set" in refused(1, *words, few)


def test_an_output_that_cannot_be(refused: Any, tmp_path: Path, model: Path, calibration: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("x")
    assert "is not empty" in refused(2, "quantize", model, "-r", "B1", "--calibration", calibration, "-o", used)
    assert "is not empty" in refused(2, "calibrate", "-m", model, "-o", used)
    assert "is not empty" in refused(2, "run", model, "--on", "cpu", "-o", used)
    file = used / "mine.txt"
    assert "is a file" in refused(2, "quantize", model, "-r", "B1", "--calibration", calibration, "-o", file)
    assert "is a file" in refused(2, "calibrate", "-m", model, "-o", file)
    assert "is a file" in refused(2, "run", model, "--on", "cpu", "-o", file)
    assert [p.name for p in used.iterdir()] == ["mine.txt"] and file.read_text() == "x"


def test_a_refused_run_leaves_what_was_there(refused: Any, tmp_path: Path, model: Path) -> None:
    """An empty directory stays; a finished plan of an earlier run stays."""
    text = tmp_path / "short.txt"
    text.write_text("Hello.\n\n" * 10)
    out = tmp_path / "out"
    out.mkdir()
    words = ["run", model, "--on", "cpu", "--text", text, "-o", out]
    refused(1, *words)
    assert out.is_dir() and list(out.iterdir()) == []
    (out / "plan.json").write_text("{}")
    refused(1, *words)
    assert {p.name for p in out.iterdir()} == {"plan.json", "run.json"}


def test_work_that_fails_before_its_first_block_leaves_nothing(
    refused: Any, tmp_path: Path, model: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise HalfbyteError("the model gives NaN")

    monkeypatch.setattr("halfbyte.experiments.quantize.quantize_blocks", fail)
    refused(1, "quantize", model, "-r", "B1", "--calibration", calibration, "-o", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_text_that_is_not_there_is_told_before_any_work(refused: Any, tmp_path: Path, model: Path, made: Path) -> None:
    lost = tmp_path / "lost.txt"
    for words in (["plan", model, "--on", "cpu"], ["run", model, "--on", "cpu", "-o", tmp_path / "run"],
                  ["eval", made], ["check", made, "--serve"], ["sensitivity", model, "-r", "B1"]):  # fmt: skip
        assert "does not exist" in refused(2, *words, "--text", lost)
        assert "is a directory" in refused(2, *words, "--text", tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_unknown_platform(refused: Any, tmp_path: Path, model: Path, made: Path) -> None:
    for words in (["plan", model], ["run", model, "-o", tmp_path / "r"], ["serve", made, "--print"]):
        assert "'h1000'" in (line := refused(2, *words, "--on", "h1000")) and "h100" in line


def test_no_vllm(refused: Any, no_vllm: None, made: Path, tmp_path: Path) -> None:
    assert "no vLLM found" in refused(1, "check", made, "--serve")
    assert "no vLLM found" in refused(1, "serve", made, "--on", "cpu")
    for words in (["check", made, "--serve"], ["serve", made, "--on", "cpu"], ["env"]):
        assert "does not exist" in refused(2, *words, "--vllm", tmp_path / "vllm")


def test_usage_errors_are_one_line_too(refused: Any, model: Path) -> None:
    assert "No such command 'quantise'" in refused(2, "quantise")
    assert "--help" in (line := refused(2, "quantize", model)) and "Missing option" in line
    assert "No such option" in refused(2, "plan", model, "--on", "h100", "--fast")
    assert "use recipes, platforms, methods" in refused(2, "ls", "models")
    assert "Invalid value" in refused(2, "ls", "recipes", "--format", "xml")
    assert "--on" in refused(2, "plan", model)


def test_wrong_gates_are_told_before_any_work(refused: Any, tmp_path: Path, model: Path) -> None:
    for gate, says in (("pppl=5%", "did you mean 'ppl'?"), ("ppl=much", "is no limit")):
        assert says in refused(2, "run", model, "--on", "cpu", "-o", tmp_path / "r", "--gate", gate)
    assert not (tmp_path / "r").exists()


def test_commands_on_what_is_no_artifact(refused: Any, tmp_path: Path, model: Path) -> None:
    missing = tmp_path / "none"
    for words in (["check", missing], ["serve", missing, "--on", "cpu", "--print"], ["eval", missing]):
        refused(2, *words)
    assert "halfbyte.json" in refused(2, "eval", model)
    assert "not quantized" in refused(1, "eval", model, "--baseline", model)
    refused(2, "report", missing)
    assert "is not quantized" in refused(2, "check", model)
    assert "is no artifact" in refused(2, "check", tmp_path)


def test_an_error_of_the_system_is_one_line(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/etc/shadow")

    monkeypatch.setattr("halfbyte.recipe.list_presets", denied)
    assert refused(1, "ls", "recipes") == "halfbyte: /etc/shadow: Permission denied"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_ctrl_c_and_no_memory_are_one_line(error: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("halfbyte.recipe.list_presets", fail)
    assert ("interrupted" if error is KeyboardInterrupt else "out of memory") in refused(1, "ls", "recipes")


def test_too_little_memory(refused: Any, tmp_path: Path, model: Path, calibration: Path) -> None:
    words = ["-r", "B3", "--calibration", calibration, "-o", tmp_path / "out"]
    line = refused(1, "quantize", model, *words, "--memory", "1MiB")
    assert "--memory of 1.00 MiB is too little" in line and "it needs some" in line
    for wrong in ("much", "12"):
        assert "write bytes with their unit, such as 12GiB" in refused(2, "quantize", model, *words, "--memory", wrong)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text with several words in it." for i in range(1600)))
    run = ["run", model, "--on", "cpu", "-r", "B3", "--text", text, "-o", tmp_path / "run", "--memory", "1MiB"]
    assert "is too little" in refused(1, *run)
    assert not (tmp_path / "out").exists()


def test_the_module_is_the_command(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "halfbyte", "plan", tmp_path / "nowhere"], capture_output=True, text=True
    )
    assert told.returncode == 2 and told.stderr.startswith("halfbyte: ") and told.stdout == ""


@pytest.mark.parametrize("command", ["quantize", "run", "sweep", "sensitivity", "eval", "calibrate"])
def test_a_device_that_is_not_there(
    command: str, refused: Any, model: Path, made: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    words: dict[str, tuple[object, ...]] = {
        "quantize": (model, "-r", "B3", "-o", out),
        "run": (model, "--on", "cpu", "-o", out),
        "sweep": (model, "--matrix", "strategy", "--on", "cpu", "-o", out),
        "sensitivity": (model, "-r", "B3"),
        "eval": (made, "--text", __file__),
        "calibrate": ("-m", model, "-o", out, __file__),
    }
    for device, says in (("cuda", "is not there: torch sees no GPU, use cpu"), ("tpu", "is unknown: write cpu, cuda")):
        assert says in refused(2, command, *words[command], "--device", device)
    assert not out.exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "its GPUs are cuda:0 to cuda:1" in refused(2, command, *words[command], "--device", "cuda:2")


def test_paths_of_another_kind(refused: Any, model: Path, made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run / "model")
    for words in (("serve", run, "--on", "cpu", "--print"), ("eval", run, "--text", __file__)):
        assert f"did you mean {run / 'model'}?" in refused(2, *words)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "name a directory" in refused(2, "quantize", model, "-r", "B3", "-o", output)
    told = refused(2, "quantize", made, "-r", "B3", "--set", "group_size=32", "-o", tmp_path / "out")
    assert "is quantized already: name the BF16 model" in told


def test_a_model_without_a_tokenizer(refused: Any, model: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*")))
    told = refused(1, "calibrate", "-m", bare, "-o", tmp_path / "out", __file__)
    assert told.endswith("copy its tokenizer files there (tokenizer.json, tokenizer_config.json)")


def test_what_is_damaged_is_neither_evaluated_nor_served(
    refused: Any, artifact: Path, model: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("halfbyte.experiments.evaluating.measure_fidelity", lambda *_: pytest.fail("it was evaluated"))
    weights = artifact / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    words = ("eval", artifact, "--baseline", model, "--text", __file__)
    (artifact / "README.md").write_text("a card of one's own is no damage")
    assert "is damaged: model.safetensors is not what was written" in refused(1, *words)
    weights.write_bytes(whole[:-7])
    assert "the manifest says" in refused(1, *words)
    monkeypatch.setattr("halfbyte.serving.run_in_place", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr("halfbyte.serving.find_vllm", lambda _: SimpleNamespace(version="0.32.0"))
    assert "is truncated" in refused(1, "serve", artifact, "--on", "cpu")


def test_windows_beyond_the_models_context(refused: Any, made: Path, model: Path) -> None:
    told = refused(2, "eval", made, "--baseline", model, "--text", __file__, "--window", 257)
    assert "windows of 257 tokens are asked for, and the model takes 256: use --window 256" in told


def test_a_hub_out_of_reach_is_one_line(refused: Any, monkeypatch: Any) -> None:
    import huggingface_hub

    def away(*_: Any, **__: Any) -> None:
        quiet.append(not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING))
        raise OSError("no answer")

    quiet: list[bool] = []
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "level", logging.WARNING)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, away)
    assert "the hub did not give it (no answer): name a directory" in refused(1, "plan", "org/name", "--on", "cpu")
    assert quiet == [True, True]
