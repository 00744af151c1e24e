"""Does real vLLM compute what the artifact says? Its perplexity over HTTP against the fake-quantized HF model's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.scoring import score_reference
from halfbyte.evaluate.windows import Windows
from halfbyte.files import make_directory, portable, write_json
from halfbyte.types import Progress, Quiet

SERVED = "served.json"
LIMIT = 0.005
"""Relative difference of the two perplexities that still counts as the same model."""
GIB = 1 << 30


def compare_served(
    directory: Path | str,
    windows: Windows,
    *,
    platform: str = "cpu",
    vllm: str | None = None,
    log_path: Path | str,
    device: str = "cpu",
    timeout: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Serve the artifact in `directory` with real vLLM, score `windows` there and in transformers, and compare.

    vllm        the user's --vllm (else HALFBYTE_VLLM, else found); log_path: where vLLM's own log goes.
    device      where transformers scores, when vLLM has ended.
    Returns the content of served.json, which says nothing of where the artifact and vLLM lie. Without a vLLM, or when
    it does not start or refuses the artifact, status is "not served" and `reason` says why in one line; nothing is
    compared then.
    Raises UsageError when the vLLM that the user names is not there.
    """
    from halfbyte.serving import find_vllm, probe

    directory, progress = Path(directory), progress or Quiet()
    blank = _blank(directory)
    try:
        install = find_vllm(vllm)
    except UsageError:
        raise
    except HalfbyteError as error:
        return {**blank, "reason": str(error)}
    limits: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    ids = [sequence.tolist() for sequence in windows.ids]
    try:
        found = probe(
            directory,
            format_of(directory),
            ids,
            platform=platform,
            install=install,
            log_path=Path(log_path),
            progress=progress,
            **limits,
        )
    except HalfbyteError as error:
        reason = str(error).replace(f"{Path(log_path).parent}/", "")
        return {**blank, "reason": reason, "vllm": install.version}
    from halfbyte.artifact import load_fake_quantized

    reference = score_reference(load_fake_quantized(directory, device=device), windows, progress=progress)
    return judge({**blank, **found, "command": _placeless(found["command"], directory)}, reference["perplexity"])


def refused(directory: Path, platform: str, vllm: str | None) -> dict[str, Any] | None:
    """The content of served.json where the platform cannot load the artifact, before anything is scored; else None."""
    from halfbyte.serving import find_vllm, serve_command

    install = find_vllm(vllm)
    try:
        serve_command(directory, format_of(directory), platform, vllm_version=install.version)
    except UsageError as error:
        return {**_blank(directory), "reason": str(error), "vllm": install.version}
    return None


def _placeless(command: Sequence[str], directory: Path) -> list[str]:
    """A command with vLLM and the artifact by their last names; the version says which vLLM it was."""
    names = {str(directory): portable(directory)}
    return [*(Path(word).name for word in command[:1]), *(names.get(word, word) for word in command[1:])]


def judge(facts: dict[str, Any], ppl_reference: float, limit: float = LIMIT) -> dict[str, Any]:
    """Add the verdict to a served artifact's facts: perplexity within `limit`, weight memory as large as the files."""
    difference = abs(facts["ppl_served"] / ppl_reference - 1)
    reasons = []
    if not difference <= limit:
        reasons.append(
            f"vLLM's perplexity {facts['ppl_served']:.3f} is {difference:.2%} off the reference's {ppl_reference:.3f}: "
            f"more than {limit:.1%}"
        )
    reported, artifact = facts["weight_gib_reported"], facts["artifact_gib"]
    if reported is not None and reported > 1.3 * artifact + 0.1:
        reasons.append(
            f"vLLM holds {reported:.2f} GiB of weights, the artifact has {artifact:.2f}: not loaded in 4 bits"
        )
    return {
        **facts,
        "status": "served",
        "reason": "; ".join(reasons),
        "ppl_reference": ppl_reference,
        "relative_difference": difference,
        "limit": limit,
        "passed": not reasons,
    }


def format_of(directory: Path) -> str | None:
    """The quant_method that config.json declares; None for an unquantized model."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{directory} is no model directory (config.json cannot be read): name an artifact") from error
    declared = config.get("quantization_config")
    return declared.get("quant_method") if isinstance(declared, dict) else None


def write_served(directory: Path | str, result: dict[str, Any]) -> Path:
    """Write served.json (whole or not at all) into `directory`; returns its path."""
    path = Path(directory) / SERVED
    make_directory(path.parent)
    write_json(path, result)
    return path


def _blank(directory: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return {
        "schema": 1,
        "kind": "served",
        "status": "not served",
        "reason": "",
        "vllm": None,
        "command": [],
        "ppl_served": None,
        "ppl_reference": None,
        "relative_difference": None,
        "limit": LIMIT,
        "weight_gib_reported": None,
        "artifact_gib": size / GIB,
        "completion": "",
        "load_seconds": None,
        "passed": False,
    }
