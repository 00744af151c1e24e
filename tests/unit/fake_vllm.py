"""A stand-in for vLLM: an environment whose `vllm serve` logs, starts a child and answers HTTP, or misbehaves.

What it does is set by the variable FAKE: ok | die | first | hang | flaky | mute | stubborn (first: a directory's first
server dies). Its child, in a session of its own,
ignores SIGTERM in the modes stubborn and hang.

`vllm bench serve` writes a result without sending the load: tokens a second are 100 for each request in flight, 1.7
times that for a quantized model, half of it with --linear-backend slow, 1.25 times with quick, and a little more with
every seed. It appends its
words to `benched` in the model's directory. FAKE=oom: from 16 in flight on it ends the server with vLLM's words for no
memory; refusing: a request fails; broken: it fails itself. Asked for logprobs, the server writes words that never
repeat; looping: a quantized model says la la la; nan: it refuses, as vLLM does; brief: it ends with its first answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

VERSION = "0.32.0+cpu"
SCRIPT = r"""
import http.server, json, os, signal, subprocess, sys, tempfile, time

if sys.argv[1:] == ["--version"]:
    print("{version}")
    sys.exit()
mode = os.environ.get("FAKE", "ok")


def quantized(directory):
    try:
        return "quantization_config" in json.load(open(os.path.join(directory, "config.json")))
    except FileNotFoundError:
        return False


def bench(words):
    import urllib.request

    given = dict(zip(words, words[1:]))
    model, level = given["--model"], int(given["--max-concurrency"])
    count, out = int(given["--num-prompts"]), int(given["--random-output-len"])
    with open(os.path.join(model, "benched"), "a") as handle:
        handle.write(json.dumps(given) + "\n")
    if mode == "broken":
        sys.exit("ValueError: no such dataset")
    if mode == "oom" and level >= 16:
        asked = json.dumps({{"model": model, "prompt": "crash"}}).encode()
        try:
            urllib.request.urlopen(given["--base-url"] + "/v1/completions", asked).read()
        except OSError:
            time.sleep(60)
    served = open(os.path.join(model, "argv-" + given["--base-url"].rpartition(":")[2])).read()
    rate = 100.0 * level * (1.7 if quantized(model) else 1) * (1 + 0.001 * (int(given["--seed"]) % 100))
    rate *= 0.5 if "--linear-backend slow" in served else 1.25 if "--linear-backend quick" in served else 1
    done = count - (mode == "refusing")
    result = {{
        "completed": done, "failed": count - done, "duration": count * out / rate, "output_throughput": rate,
        "request_throughput": rate / out, "errors": ["", "boom\n at x"][: 1 + count - done],
        "total_token_throughput": rate * (1 + int(given["--random-input-len"]) / out),
    }}
    for index, name in enumerate(("ttft", "itl", "e2el")):
        result.update({{f"p{{p}}_{{name}}_ms": (index + 1) * p / level for p in (50, 95, 99)}})
    place = os.path.join(given["--result-dir"], given["--result-filename"])
    json.dump(result, open(place, "w"))


if sys.argv[1] == "bench":
    bench(sys.argv[3:])
    sys.exit()
directory, port = sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1])
print("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
print("INFO 11-24 00:44:05 [model.py:733] Resolved architecture: Fake", flush=True)
life = "import signal, time; signal.signal(signal.SIGTERM, signal.{{}}); time.sleep(600)"
life = life.format("SIG_IGN" if mode in ("stubborn", "hang") else "SIG_DFL")
child = subprocess.Popen([sys.executable, "-IS", "-c", life], start_new_session=True)
with open(os.path.join(directory, "pids"), "w") as handle:
    handle.write(f"{{os.getpid()}} {{child.pid}}")
with open(os.path.join(directory, "argv"), "w") as handle:
    handle.write(" ".join(sys.argv))
left = tempfile.mkstemp(prefix="vllm_dist_")[1]  # as vLLM leaves its sockets
with open(os.path.join(directory, f"argv-{{port}}"), "w") as handle:
    handle.write(" ".join(sys.argv))
with open(os.path.join(directory, "left"), "w") as handle:
    handle.write(left)
with open(os.path.join(directory, "starts"), "a") as handle:
    handle.write("start\n")
if mode == "first" and len(open(os.path.join(directory, "starts")).readlines()) == 1:
    print("torch.OutOfMemoryError: no room beside others", flush=True)
    sys.exit(1)
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
        if mode == "brief":
            self.say({{}})
            print("RuntimeError: gone again", flush=True)
            os._exit(3)
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
            if "logprobs" in asked:
                if mode == "nan":
                    return self.say({{"error": {{"message": "Out of range float values"}}}}, 500)
                looping = mode == "looping" and quantized(directory)
                tokens = [" la" if looping else f" {{i}}" for i in range(asked["max_tokens"])]
                choice["text"] = "".join(tokens)
                choice["logprobs"] = {{"tokens": tokens, "token_logprobs": [-1.0] * len(tokens)}}
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
