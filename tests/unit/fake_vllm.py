"""A stand-in for vLLM: an environment whose `vllm serve` logs, starts a child and answers HTTP, or misbehaves.

What it does is set by the variable FAKE: ok | die | hang | flaky | mute | stubborn. Its child, in a session of its own,
ignores SIGTERM in the modes stubborn and hang.
"""

from __future__ import annotations

import sys
from pathlib import Path

VERSION = "0.32.0+cpu"
SCRIPT = r"""
import http.server, json, os, signal, subprocess, sys, time

if sys.argv[1:] == ["--version"]:
    print("{version}")
    sys.exit()
mode = os.environ.get("FAKE", "ok")
directory, port = sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1])
print("INFO 11-24 00:44:05 [model.py:733] Resolved architecture: Fake", flush=True)
life = "import signal, time; signal.signal(signal.SIGTERM, signal.{{}}); time.sleep(600)"
life = life.format("SIG_IGN" if mode in ("stubborn", "hang") else "SIG_DFL")
child = subprocess.Popen([sys.executable, "-IS", "-c", life], start_new_session=True)
with open(os.path.join(directory, "pids"), "w") as handle:
    handle.write(f"{{os.getpid()}} {{child.pid}}")
if mode == "die":
    print("(Worker pid=9) ERROR 11-24 00:48:27 [x.py:1] ValueError: the weights are wrong", flush=True)
    print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(1)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "hang":
    time.sleep(600)
print("INFO Loading weights took 0.1 seconds\nINFO Model loading took 0.25 GiB memory and 0.1 seconds", flush=True)
print("INFO GPU KV cache size: 1,024 tokens, quantization=gptq, Using FakeLinearKernel for Fake", flush=True)
flaws = ["503", "cut"] if mode == "flaky" else []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def say(self, tree, status=200):
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.say({{"data": [{{"id": directory}}]}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        flaw = flaws.pop(0) if flaws else ""
        if flaw == "cut":
            self.close_connection = True
            return self.connection.close()
        if flaw == "503":
            return self.say({{"error": {{"message": "busy"}}}}, 503)
        prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
        if asked["model"] != directory or prompts == ["refuse"]:
            return self.say({{"error": {{"message": "no such\n model"}}}}, 404)
        if prompts == ["crash"]:
            print("torch.OutOfMemoryError: no room", flush=True)
            os._exit(3)
        with open(os.path.join(directory, "batches"), "a") as handle:
            handle.write(f"{{len(prompts)}} ")
        choices = []
        for index, ids in reversed(list(enumerate(prompts))):
            choice = {{"index": index, "text": " Paris"}}
            if "prompt_logprobs" in asked and mode != "mute":
                choice["prompt_logprobs"] = [None] + [{{str(i): {{"logprob": -i / 100}}}} for i in ids[1:]]
            choices.append(choice)
        self.say({{"choices": choices}})


http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def make_fake(directory: Path) -> Path:
    """An environment directory with bin/vllm in it; its version comes from `vllm --version`."""
    executable = directory / "bin" / "vllm"
    executable.parent.mkdir(parents=True)
    executable.write_text(f"#!{sys.executable} -IS\n" + SCRIPT.format(version=VERSION))
    executable.chmod(0o755)
    return directory
