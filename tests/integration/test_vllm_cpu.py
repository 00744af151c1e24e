"""Real vLLM on the CPU: it serves what transformers computes, says why it fails, and never outlives its parent."""

import argparse
import decimal
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import unittest

import psutil
import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.models import resolve_model
from halfbyte.serving import ServeCommand, Server, find_vllm, probe

pytestmark = pytest.mark.vllm
WINDOW, WINDOWS = 256, 16
"""On a few hundred tokens the two differ by up to 0.5 % through BF16 rounding alone; on thousands by 0.1 %."""


@pytest.fixture(scope="module")
def install():
    try:
        return find_vllm()
    except HalfbyteError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model():
    try:
        return resolve_model("smollm2-135m")
    except HalfbyteError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def windows(model):
    from transformers import AutoTokenizer

    modules = (argparse, decimal, logging, statistics, subprocess, unittest)
    text = "\n\n".join(value.__doc__ or "" for module in modules for value in vars(module).values())
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    assert len(ids) > WINDOW * WINDOWS
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]


def perplexity_of_transformers(model, windows):
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    ids = torch.tensor(windows)
    with torch.inference_mode():
        logits = network(ids).logits[:, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


def test_served_perplexity_agrees_with_transformers(install, model, windows, tmp_path):
    result = probe(model, None, windows, platform="cpu", install=install, log_path=tmp_path / "vllm.log")
    expected = perplexity_of_transformers(model, windows)
    print(f"served {result['ppl_served']:.4f}, transformers {expected:.4f}, ready in {result['load_seconds']} s")
    assert result["ppl_served"] == pytest.approx(expected, rel=0.005)
    assert result["tokens"] == WINDOWS * (WINDOW - 1)
    assert "Paris" in result["completion"]
    assert result["kv_cache_tokens"] > WINDOW
    assert result["quantization"] is None and result["vllm"] == install.version


def test_a_refusal_is_told_in_vllms_own_words(install, model, tmp_path):
    command = ServeCommand(["vllm", "serve", str(model), "--max-model-len", "999999"])
    with pytest.raises(HalfbyteError, match=r"max_model_len \(999999\) is greater than"):
        with Server(command, install, log_path=tmp_path / "vllm.log"):
            pass


def test_no_engine_survives_a_killed_parent(install, model, tmp_path):
    log = tmp_path / "vllm.log"
    script = f"""
from pathlib import Path
from halfbyte.serving import Server, find_vllm, serve_command
command = serve_command({str(model)!r}, None, "cpu", context=256)
Server(command, find_vllm({str(install.executable)!r}), log_path=Path({str(log)!r})).__enter__()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (log.exists() and "Starting to load model" in log.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert any("EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline()) for process in family)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
