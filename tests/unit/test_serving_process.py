"""A server's life and end, its client and the probe, on a stand-in for vLLM."""

import importlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.serving import Client, ServeCommand, Server, find_vllm, perplexity, probe
from halfbyte.types import Quiet

from .fake_vllm import VERSION, make_fake


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    return find_vllm(str(make_fake(tmp_path_factory.mktemp("fake") / "env")))


def server(install, directory, mode="ok", *words, **options):
    command = ServeCommand(["vllm", "serve", str(directory), *words], {"FAKE": mode})
    return Server(command, install, log_path=directory / "vllm.log", **options)


def pids(directory):
    return [int(word) for word in (directory / "pids").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def left(directory):
    """The temporary file that the stand-in made."""
    return Path((directory / "left").read_text())


def gone(directory, within=20.0):
    """Whether every process that the stand-in started ends, and its temporary files go; waits for it."""
    deadline = time.monotonic() + within
    while (any(map(alive, pids(directory))) or left(directory).parent.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids(directory))) and not left(directory).parent.exists()


def test_a_server_finds_the_memory_that_torch_kept(install, tmp_path, monkeypatch):
    """What torch keeps for later on a GPU is as good as taken: vLLM asks for most of it at once."""
    order = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: order.append((tmp_path / "starts").exists()))
    with server(install, tmp_path):
        assert order == [False] and (tmp_path / "starts").exists()


class Recorder(Quiet):
    def __init__(self):
        super().__init__()
        self.total, self.done, self.labels = 0, 0, []

    def start(self, label, total):
        self.labels.append(label)
        self.total, self.done = total, 0

    def advance(self, steps=1, note=""):
        self.done += steps


def test_a_server_answers_and_leaves_nothing(install, tmp_path):
    progress = Recorder()
    with server(install, tmp_path, progress=progress) as running:
        assert running.running and running.load_seconds > 0
        assert all(map(alive, pids(tmp_path)))
        assert left(tmp_path).exists() and left(tmp_path).parent != Path(tempfile.gettempdir())
        assert progress.done == progress.total
        facts = running.facts
        with Client(running.url) as client:
            assert client.healthy()
            assert client.model == str(tmp_path)
    assert (facts.weight_gib, facts.kv_cache_tokens, facts.kernels) == (0.25, 1024, ("FakeLinearKernel",))
    assert not any(map(alive, pids(tmp_path))) and not left(tmp_path).parent.exists()
    with Client(running.url) as client:
        assert not client.healthy()
    assert (tmp_path / "vllm.log").read_text().startswith("# FAKE=ok \\\n# ")


def test_what_torch_keeps_outlives_the_server(install, tmp_path, monkeypatch):
    """A cache of compiled code is worth seconds at every start; sockets are not."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with server(install, tmp_path):
        (cache,) = left(tmp_path).parent.glob("torchinductor_*")
        (cache / "compiled").touch()
    assert not left(tmp_path).parent.exists()
    assert [p.parent.parent for p in tmp_path.glob("torchinductor_*/compiled")] == [tmp_path]


def test_a_server_that_dies_gives_its_own_reason(install, tmp_path):
    with pytest.raises(HalfbyteError, match=r"vLLM failed: ValueError: the weights are wrong \(log: .*vllm.log\)"):
        with server(install, tmp_path, "die"):
            pass
    assert gone(tmp_path)


def test_a_server_that_hangs_is_given_up(install, tmp_path):
    with pytest.raises(HalfbyteError, match="did not answer within 2 s; its last word: Resolved architecture: Fake"):
        with server(install, tmp_path, "hang", timeout=2):
            pass
    assert gone(tmp_path)


def test_an_executable_that_cannot_run_is_told(install, tmp_path):
    broken = tmp_path / "vllm"
    broken.write_text("#!/nonexistent/python\n")
    broken.chmod(0o755)
    other = type(install)(broken, "0", broken)
    with pytest.raises(HalfbyteError, match="vllm cannot be run"):
        with server(other, tmp_path):
            pass


def test_a_port_in_use_is_one_clear_line(install, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(
            UsageError, match=f"port {port} on 127.0.0.1 cannot be used .Address already in use.: choose"
        ):
            server(install, tmp_path, "ok", "--port", port)
    with server(install, tmp_path, "ok", "--port", port) as running:
        assert running.url.endswith(f":{port}")
    with pytest.raises(UsageError, match="70000 is no port"):
        server(install, tmp_path, "ok", "--port", "70000")


def test_an_exception_in_the_block_stops_the_server(install, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with server(install, tmp_path):
            raise KeyboardInterrupt
    assert not any(map(alive, pids(tmp_path)))


def test_a_server_deaf_to_sigterm_is_killed(install, tmp_path, monkeypatch):
    monkeypatch.setattr("halfbyte.serving.process.GRACE_S", 0.5)
    with server(install, tmp_path, "stubborn"):
        pass
    assert not any(map(alive, pids(tmp_path)))


KILLED = """
import sys, time
from pathlib import Path
from halfbyte.serving import ServeCommand, Server, VllmInstall
directory, executable = Path(sys.argv[1]), Path(sys.argv[2])
command = ServeCommand(["vllm", "serve", str(directory)], {"FAKE": sys.argv[3]})
with Server(command, VllmInstall(executable, "0", executable), log_path=directory / "vllm.log"):
    (directory / "ready").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["ok", "hang"])
def test_a_killed_parent_leaves_no_process(install, tmp_path, number, mode):
    script = [sys.executable, "-c", KILLED, str(tmp_path), str(install.executable), mode]
    parent = subprocess.Popen(script, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        mark = tmp_path / ("ready" if mode == "ok" else "pids")
        deadline = time.monotonic() + 60
        while not (mark.exists() and (tmp_path / "pids").read_text()) and time.monotonic() < deadline:
            assert parent.poll() is None
            time.sleep(0.05)
        assert all(map(alive, pids(tmp_path)))
    finally:
        parent.send_signal(number)
        parent.wait()
    assert gone(tmp_path)


def test_scores_come_back_by_window_in_bounded_batches(install, tmp_path):
    windows = [[5, 10, 20], [7, 30], [1, 2, 3, 4], [9, 50], [8, 60]]
    progress = Recorder()
    with server(install, tmp_path) as running, Client(running.url) as client:
        scored = client.score(windows, batch=2, progress=progress)
        assert client.complete("The capital") == " Paris"
        with pytest.raises(HalfbyteError, match=r"refused /v1/completions \(404\): no such model"):
            client.complete("refuse")
    assert scored == [[None, -0.1, -0.2], [None, -0.3], [None, -0.02, -0.03, -0.04], [None, -0.5], [None, -0.6]]
    assert (tmp_path / "batches").read_text().split() == ["2", "2", "1", "1"]
    assert (progress.labels, progress.done) == (["scoring over HTTP"], 5)


def test_a_passing_failure_is_tried_again_once(install, tmp_path, monkeypatch):
    monkeypatch.setattr("halfbyte.serving.client.RETRY_AFTER_S", 0.01)
    with server(install, tmp_path, "flaky") as running, Client(running.url) as client:
        with pytest.raises(HalfbyteError, match="no longer answers"):
            client.score([[1, 2]])
        assert client.score([[1, 2]]) == [[None, -0.02]]


def test_missing_logprobs_are_an_error(install, tmp_path):
    with server(install, tmp_path, "mute") as running, Client(running.url) as client:
        with pytest.raises(HalfbyteError, match="no log-probabilities"):
            client.score([[1, 2]])


def test_probe_reports_what_was_served(install, tmp_path):
    result = probe(tmp_path, "gptq", [[1, 10, 20], [5, 30]], platform="cpu", install=install, log_path=tmp_path / "log")
    assert result["ppl_served"] == pytest.approx(math.exp((0.1 + 0.2 + 0.3) / 3))
    assert result["tokens"] == 3
    assert result["completion"] == " Paris"
    assert (result["weight_gib_reported"], result["kernels"]) == (0.25, ["FakeLinearKernel"])
    assert result["vllm"] == VERSION
    assert result["command"][0] == str(install.executable)
    assert {"VLLM_CPU_INT4_W4A8": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}.items() <= result[
        "env"
    ].items()
    assert result["command"].count("--kv-cache-dtype") == 1
    assert not any(map(alive, pids(tmp_path)))


def test_probe_tells_why_a_server_died_under_it(install, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("halfbyte.serving.probe"), "PROMPT", "crash")
    with pytest.raises(HalfbyteError, match=r"vLLM failed: torch.OutOfMemoryError: no room"):
        probe(tmp_path, None, [[1, 2]], platform="cpu", install=install, log_path=tmp_path / "log")


def test_probe_refuses_windows_that_cannot_be_scored(install, tmp_path):
    options = {"platform": "cpu", "install": install, "log_path": tmp_path / "log"}
    for windows in ([], [[1]]):
        with pytest.raises(UsageError, match="at least two tokens"):
            probe(tmp_path, None, windows, **options)
    with pytest.raises(UsageError, match="context of at least 5, not 4"):
        probe(tmp_path, None, [[1, 2, 3, 4]], context=4, **options)


def test_perplexity_counts_tokens_not_windows():
    assert perplexity([[None, -1.0, -3.0], [None, -2.0]]) == (pytest.approx(math.exp(2.0)), 3)
    with pytest.raises(HalfbyteError, match="no token"):
        perplexity([[None]])
