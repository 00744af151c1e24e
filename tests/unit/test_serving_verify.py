"""What is known of vLLM, asked of a made-up vLLM: a fact holds, differs, or cannot be asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.platforms import facts_for
from halfbyte.serving import VllmInstall, standing
from halfbyte.serving import verify as command
from halfbyte.serving.ask import MARK
from halfbyte.serving.verify import ASK, DIFFERS, HOLDS, UNKNOWN
from tests.unit.artifacts import halfbyte
from tests.unit.fake_vllm import make_fake

PACKAGE = {
    "config/model.py": 'import typing\nModelDType = typing.Literal["auto", "half", "float16", "bfloat16", "float"]\n',
    "config/cache.py": 'import typing\nCacheDType = typing.Literal["auto", "float16", "bfloat16", "fp8", "fp8_e4m3",'
    ' "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4", "int4_per_token_head", "int8_per_token_head",'
    ' "fp8_per_token_head", "new"]\n',
    "model_executor/layers/quantization/__init__.py": """
QUANTIZATION_METHODS = ["gptq", "gptq_marlin", "auto_gptq", "awq", "modelopt", "modelopt_fp4", "compressed-tensors"]
class Config:
    def get_supported_act_dtypes(self):
        return ["torch.float16", "torch.bfloat16"]
def get_quantization_config(method):
    return Config
""",
    "model_executor/layers/quantization/utils/marlin_utils.py": "MARLIN_SUPPORTED_GROUP_SIZES = [64, 128, -1]\n",
    "engine/arg_utils.py": "class EngineArgs:\n    gpu_memory_utilization = 0.92\n",
    "utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser\n",
    "entrypoints/openai/cli_args.py": """
def make_arg_parser(parser):
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32", "fp16"])
    parser.add_argument("--enforce-eager", action="store_true")
    return parser
""",
}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made-up")
    for name, text in PACKAGE.items():
        path = root / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for above in path.relative_to(root).parents[:-1]:
            (root / above / "__init__.py").touch()
    return root


@pytest.fixture()
def verdicts(made_up: Path, tmp_path: Path) -> Any:
    """What `verify` says of the made-up package, as a release of that version."""

    def ask(version: str) -> dict[str, Any]:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={made_up} exec {sys.executable} -S "$@"\n')
        python.chmod(0o755)
        return command(VllmInstall(tmp_path / "vllm", version, python))

    return ask


def test_each_fact_holds_differs_or_cannot_be_asked(verdicts: Any) -> None:
    result = verdicts("0.32.0+cpu")
    rows = {row["fact"]: row for row in result["facts"]}
    assert (result["schema"], result["kind"], result["ok"], result["vllm"]) == (1, "vllm-facts", False, "0.32.0+cpu")
    assert rows["choices of --dtype"]["verdict"] == DIFFERS and rows["choices of --dtype"]["why"] == "gone: float32"
    assert rows["choices of --kv-cache-dtype"]["verdict"] == HOLDS
    assert rows["choices of --kv-cache-dtype"]["why"] == "also: new"
    assert rows["awq: quantization methods"]["why"] == "gone: awq_marlin, auto_awq"
    assert rows["gptq: activations of auto_gptq"]["verdict"] == HOLDS
    assert (
        rows["group sizes of Marlin"]["verdict"] == DIFFERS
        and "it says [64, 128, -1]" in rows["group sizes of Marlin"]["why"]
    )
    assert rows["group sizes of Conch"]["verdict"] == UNKNOWN and "No module" in rows["group sizes of Conch"]["why"]
    assert rows["gpu_memory_utilization"]["verdict"] == HOLDS
    assert rows["vllm serve takes --dtype bfloat16"]["verdict"] == HOLDS
    assert rows["vllm serve takes --enforce-eager"]["verdict"] == HOLDS
    assert rows["vllm serve takes --linear-backend humming"]["verdict"] == DIFFERS
    assert rows["vllm serve refuses --dtype bf16"]["verdict"] == HOLDS
    assert rows["vllm serve refuses --dtype fp16"]["verdict"] == DIFFERS
    quirks = {f"quirk {quirk.id}" for quirk in facts_for("0.32.0").quirks}
    assert quirks <= rows.keys() and all(rows[name]["verdict"] == UNKNOWN for name in quirks)


def test_questions_and_answers_are_one_line_of_json(made_up: Path) -> None:
    asked = json.dumps({"methods": ["gptq"], "accepted": [["--dtype", "auto"]], "refused": []})
    done = subprocess.run(
        [sys.executable, "-S", str(ASK), asked],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(made_up)},
    )
    answers = json.loads(done.stdout.splitlines()[-1].removeprefix(MARK))
    assert answers["accepted"]["value"] == {"--dtype auto": {"value": True}}
    assert answers["dtypes"]["value"][0] == "auto" and "why" in answers["weights_track"]


def test_a_vllm_that_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    for text in ("#!/bin/sh\necho broken >&2\nexit 3\n", "#!/bin/sh\necho hello\n"):
        python = tmp_path / "python"
        python.write_text(text)
        python.chmod(0o755)
        with pytest.raises(HalfbyteError, match=r"does not answer: (broken|it said nothing)"):
            command(VllmInstall(tmp_path / "vllm", "0.32.0", python))
    with pytest.raises(HalfbyteError, match="cannot be asked"):
        command(VllmInstall(tmp_path / "vllm", "0.32.0", tmp_path / "none"))


def test_how_well_a_version_is_known() -> None:
    assert standing("0.32.0+cpu") == "0.32.0 was seen (measured on CPU)"
    assert standing("0.30.1").startswith("untested: 0.30.1 lies in the range 0.27.0 to before 0.33.0, of which 0.32.0")
    assert standing("0.99.0").startswith("untested: vLLM 0.99.0 is newer than any seen here")
    assert all("env --verify" in standing(version) for version in ("0.30.1", "0.99.0", "0.1.0"))


def test_the_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fact that differs makes it exit 1, and so does a stand-in that has no code to ask."""
    fake = make_fake(tmp_path / "fake")
    assert halfbyte("env", "--verify", "--vllm", fake) == 1
    assert "has no vLLM to ask" in capsys.readouterr().err
    rows = [{"fact": "x", "known": 1, "found": 2, "verdict": DIFFERS, "why": "it says 2"}]
    result = {"schema": 1, "kind": "vllm-facts", "vllm": "0.32.0", "ok": False, "notice": "", "facts": rows}
    monkeypatch.setattr("halfbyte.serving.verify", lambda install: result)
    assert halfbyte("env", "--verify", "--vllm", fake, "--format", "json") == 1
    assert json.loads(capsys.readouterr().out) == result
