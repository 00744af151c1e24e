"""The command line: bad input is one line, JSON is JSON, and its surface does not change unnoticed.

`python -m tests.unit.test_cli` writes cli_surface.txt again, after a change of commands or options that is meant.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from typer.models import OptionInfo

import halfbyte.serving.install as install
from halfbyte.cli.app import app
from tests.tiny import make_tiny
from tests.unit.artifacts import edit_json, halfbyte, random_set
from tests.unit.fake_vllm import VERSION, make_fake

SURFACE = Path(__file__).with_name("cli_surface.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_set().save(tmp_path_factory.mktemp("cli") / "set")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact, not to be changed."""
    from halfbyte import Recipe, quantize

    out = tmp_path_factory.mktemp("cli") / "made"
    quantize(str(model), Recipe(method="rtn", group_size=32), out)
    return out


@pytest.fixture()
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "artifact"))


@pytest.fixture()
def no_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HALFBYTE_VLLM", raising=False)
    monkeypatch.setattr(install, "ENVIRONMENT", "no-such-environment")
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture()
def refused(capsys: Any) -> Callable[..., str]:
    """Run a command that must fail; returns its one line. Nothing may stand on stdout."""

    def run(code: int, *words: object) -> str:
        capsys.readouterr()
        assert halfbyte(*words) == code
        shown = capsys.readouterr()
        assert shown.out == "" and "Traceback" not in shown.err
        lines = shown.err.splitlines()
        assert [line for line in lines if line.startswith("halfbyte: ")] == lines[-1:], shown.err
        return lines[-1]

    return run


@pytest.fixture()
def as_json(capsys: Any) -> Callable[..., Any]:
    """Run a command with --format json; returns what stands on stdout, which must be JSON and nothing else."""

    def run(*words: object, code: int = 0) -> Any:
        capsys.readouterr()
        *before, last = words if "--" not in words else words[: words.index("--")]
        after = words[words.index("--") :] if "--" in words else ()
        assert halfbyte(*before, last, "--format", "json", *after) == code
        return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return run


def copy(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def test_not_a_model_directory(refused: Any, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    for words in (["plan", "{}", "--on", "h100"], ["quantize", "{}", "-r", "B1", "-o", str(out)],
                  ["run", "{}", "--on", "cpu", "-o", str(tmp_path / "run")]):  # fmt: skip
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        for name, says in ((tmp_path / "nowhere", "is no directory"), (empty, "is not a model directory"),
                           (model / "config.json", "is a file: name the model's directory")):  # fmt: skip
            assert says in refused(2, *(word.format(name) for word in words))
    assert not out.exists()


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
    copy(model, tmp_path / "m")
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
    assert "group_size=32" in line, "it should name what would work"


def test_too_few_calibration_tokens(refused: Any, tmp_path: Path, model: Path) -> None:
    few = random_set(tokens=500).save(tmp_path / "few")
    words = ["quantize", model, "-r", "B1", "-o", tmp_path / "out", "--calibration"]
    assert "500 tokens: 2,048 are the least" in refused(1, *words, few)
    text = tmp_path / "short.txt"
    text.write_text("Hello.\n")
    refused(1, *words, text)
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
    assert "cannot be written" in refused(1, "quantize", model, "-r", "B1", "--calibration", calibration, "-o", file)
    assert "is a file" in refused(2, "calibrate", "-m", model, "-o", file)
    assert "cannot be written" in refused(1, "run", model, "--on", "cpu", "-o", file)
    assert [p.name for p in used.iterdir()] == ["mine.txt"] and file.read_text() == "x"


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
    assert not (tmp_path / "r" / "plan.json").exists()


def test_commands_on_what_is_no_artifact(refused: Any, tmp_path: Path, model: Path) -> None:
    missing = tmp_path / "none"
    for words in (["check", missing], ["serve", missing, "--on", "cpu", "--print"], ["eval", missing]):
        refused(2, *words)
    assert "halfbyte.json" in refused(2, "eval", model)
    assert "not quantized" in refused(1, "eval", model, "--baseline", model)
    refused(2, "report", missing)


def shard(artifact: Path) -> Path:
    return artifact / "model.safetensors"


def rewrite(artifact: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    with safe_open(shard(artifact), framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, shard(artifact), metadata={"format": "pt"})


def flip_a_bit(artifact: Path) -> None:
    raw = bytearray(shard(artifact).read_bytes())
    raw[len(raw) // 2] ^= 4
    shard(artifact).write_bytes(raw)


def poison_a_scale(artifact: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")

    rewrite(artifact, change)


def drop_a_tensor(artifact: Path) -> None:
    rewrite(artifact, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.qweight"))


def change_the_group_size(artifact: Path) -> None:
    edit_json(artifact / "config.json", lambda c: c["quantization_config"].update(group_size=64))


def lose_the_manifest(artifact: Path) -> None:
    (artifact / "halfbyte.json").unlink()


def truncate(artifact: Path) -> None:
    shard(artifact).write_bytes(shard(artifact).read_bytes()[:-1])


DAMAGES = {
    "hash": (flip_a_bit, "model.safetensors"),
    "not-finite": (poison_a_scale, "model.layers.1.mlp.up_proj.scales"),
    "tensor-missing": (drop_a_tensor, "model.layers.0.self_attn.q_proj.qweight"),
    "config": (change_the_group_size, "model.layers.0.self_attn.q_proj"),
    "manifest": (lose_the_manifest, "halfbyte.json"),
    "header": (truncate, "model.safetensors"),
}


@pytest.mark.parametrize("code", DAMAGES)
def test_check_names_the_damage(code: str, artifact: Path, capsys: Any, as_json: Any) -> None:
    damage, where = DAMAGES[code]
    assert halfbyte("check", artifact) == 0
    assert f"{artifact} is sound" in capsys.readouterr().out
    damage(artifact)
    assert halfbyte("check", artifact) == 1
    shown = capsys.readouterr()
    named = [line for line in shown.out.splitlines() if line.startswith(f"{code}: ") and where in line]
    assert named and "is damaged" in shown.out and "Traceback" not in shown.err
    result = as_json("check", artifact, code=1)
    assert not result["ok"] and code in {finding["code"] for finding in result["findings"]}


def test_check_writes_its_result(made: Path, tmp_path: Path, as_json: Any) -> None:
    result = as_json("check", made, "-o", tmp_path / "deep" / "place")
    written = json.loads((tmp_path / "deep" / "place" / "check.json").read_text())
    assert written["ok"] and result == {**written, "served": None}


def test_plan(model: Path, capsys: Any, as_json: Any) -> None:
    result = as_json("plan", model, "--on", "h100", "--on", "mi325x", "--context", "128", "--concurrency", "4")
    assert result["kind"] == "plan" and set(result["commands"]) == {"h100", "mi325x"}
    assert result["bytes"]["after"] < result["bytes"]["before"] and result["request"]["context"] == 128
    given = as_json("plan", model, "--on", "cpu", "-r", "B3", "--set", "ignore+=re:.*down_proj")
    assert given["recipe"]["group_size"] == 64 and given["recipe"]["ignore"] == ["lm_head", "re:.*down_proj"]
    assert halfbyte("plan", model, "--on", "h100") == 0
    shown = capsys.readouterr()
    assert "vllm serve" in shown.out and f"next: halfbyte run {model} --on h100" in shown.out and shown.err == ""


def test_calibrate(model: Path, tmp_path: Path, capsys: Any, as_json: Any) -> None:
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(f"Paragraph {i}: " + "words and words, " * 12 for i in range(30)))
    words = ["calibrate", "-m", model, text, "--sequences", 20, "--max-tokens", 64]
    manifest = as_json(*words, "-o", tmp_path / "a")
    assert manifest == json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["source"]["kind"] == "text" and manifest["longest"] <= 64
    assert halfbyte(*words, "-o", tmp_path / "a") == 2
    assert halfbyte(*words, "-o", tmp_path / "a", "--force", "--strategy", "stream") == 0
    assert "20 sequences, 1,280 tokens" in capsys.readouterr().out
    own = as_json("calibrate", "-m", model, "-o", tmp_path / "own", "--sequences", 8, "--max-tokens", 48)
    assert own["source"]["kind"] == "self-generated" and own["tokens"] >= 200


def test_quantize_and_eval(model: Path, calibration: Path, tmp_path: Path, capsys: Any, as_json: Any) -> None:
    words = ["quantize", model, "-r", "B3", "--calibration", calibration, "-o", tmp_path / "out"]
    manifest = as_json(*words)
    assert manifest["kind"] == "manifest" and manifest["command"].startswith(f"halfbyte quantize {model} -r B3")
    assert halfbyte(*words) == 0
    last = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "out") in last[0] and "bits a quantized weight" in last[0] and "worst" in last[1]
    assert last[2] == f"next: halfbyte check {tmp_path / 'out'} --serve"
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    scored = ["eval", tmp_path / "out", "--text", text, "--window", 64, "--windows", 4, "-o", tmp_path / "e"]
    result = as_json(*scored)
    assert result == json.loads((tmp_path / "e" / "eval.json").read_text()) and result["baseline"] == str(model)
    assert result["text"]["windows"] == 4 and result["metrics"]["kl_mean"]["value"] > 0
    assert halfbyte(*scored) == 0
    assert "top-1 agreement" in capsys.readouterr().out


def test_serve_prints_the_command(made: Path, no_vllm: None, capsys: Any, as_json: Any) -> None:
    assert halfbyte("serve", made, "--on", "cpu", "--print", "--port", 8123, "--", "--seed", "3") == 0
    line = capsys.readouterr().out
    assert f"vllm serve {made}" in line and "--port 8123" in line and line.rstrip().endswith("--seed 3")
    value = as_json("serve", made, "--on", "h100", "--print", "--context", "64", "--", "--seed", "3")
    assert value["argv"][:3] == ["vllm", "serve", str(made)] and value["argv"][-2:] == ["--seed", "3"]
    assert value["argv"][value["argv"].index("--max-model-len") + 1] == "64"


def test_ls(capsys: Any, as_json: Any) -> None:
    expected = {"recipes": "B1", "platforms": "h100", "methods": "gptq"}
    for what, one in expected.items():
        rows = as_json("ls", what)
        assert one in rows and all(isinstance(line, str) and line for line in rows.values())
        assert halfbyte("ls", what) == 0
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == len(rows) and [line.split()[0] for line in shown] == list(rows)


def test_env(no_vllm: None, tmp_path: Path, capsys: Any, as_json: Any) -> None:
    found = as_json("env")
    assert found["torch"] == torch.__version__ and found["vllm"] is None and "no vLLM found" in found["vllm_facts"]
    assert as_json("env", "--vllm", make_fake(tmp_path / "fake"))["vllm"] == VERSION
    assert halfbyte("env") == 0
    assert "torch" in capsys.readouterr().out


def test_report_of_a_run_directory(made: Path, tmp_path: Path, as_json: Any) -> None:
    copy(made, tmp_path / "run" / "model")
    result = as_json("report", tmp_path / "run")
    assert result == {"html": str(tmp_path / "run" / "report.html"), "markdown": str(tmp_path / "run" / "report.md")}
    assert all(Path(path).is_file() for path in result.values())


def test_version_and_help_need_no_model(capsys: Any) -> None:
    for words in (["--help"], ["quantize", "--help"], ["-h"]):
        assert halfbyte(*words) == 0
        assert "Usage: halfbyte" in capsys.readouterr().out
    assert halfbyte() == 2


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


def test_the_surface_is_frozen() -> None:
    assert surface() == SURFACE.read_text(encoding="utf-8"), (
        "the command line's surface changed; if that is meant, write it down with `python -m tests.unit.test_cli`, "
        "and say it in CHANGELOG.md"
    )


def surface() -> str:
    """Commands, arguments and options with their types and defaults, a line each, as the functions state them."""
    lines = []
    for command in app.registered_commands:
        assert command.callback is not None
        lines.append(f"{command.name}: {inspect.getdoc(command.callback)}")
        hints = get_type_hints(command.callback, include_extras=True)
        for name, parameter in inspect.signature(command.callback).parameters.items():
            if hints[name] is not typer.Context:
                lines.append("    " + _parameter(name, hints[name], parameter.default))
    return "\n".join(lines) + "\n"


def _parameter(name: str, hint: Any, default: Any) -> str:
    kind, info = get_args(hint)
    named = [info.default, *(info.param_decls or ())] if isinstance(info, OptionInfo) else [info.metavar]
    decls = [word for word in named if isinstance(word, str)]
    words = [" ".join(decls) or "--" + name.replace("_", "-"), _type(kind, info)]
    words.append("required" if default is inspect.Parameter.empty else f"default {_value(default)}")
    return ", ".join(words)


def _value(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def _type(kind: Any, info: Any) -> str:
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in (Union, UnionType) and len(parts) == 1:
        return _type(parts[0], info)
    if get_origin(kind) is list:
        return f"list of {_type(parts[0], info)}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(choice.value for choice in kind)
    bounds = "".join(f" {word} {x}" for word, x in (("from", info.min), ("to", info.max)) if x is not None)
    return {bool: "flag", str: "text", int: "integer", float: "number", Path: "path"}[kind] + bounds


if __name__ == "__main__":
    SURFACE.write_text(surface(), encoding="utf-8")
    print(f"written: {SURFACE}")
