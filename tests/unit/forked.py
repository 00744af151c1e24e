"""Runs the command line in forked children, and does something to each at its nth finished write.

A program of its own, so that what it forks has imported everything and computed nothing:
    python -m tests.unit.forked JOBS.json
JOBS.json: a list of {"words": [...], "act": "kill" | "interrupt" | "full" | null, "at": n}. At the nth rename of a
finished file (from 0) the child gets SIGKILL or SIGINT before it is renamed, or the disk is full from then on.
Prints a list of {"status" (negative: the signal), "stdout", "stderr", "writes"}.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 150_000


def run_forked(scratch: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run `jobs` one after the other in one such program; see above."""
    path = scratch / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.forked", str(path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _arm(job: dict[str, Any], count: Callable[[], int]) -> None:
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        here = count()
        if job.get("act") and here == job["at"] and job["act"] != "full":
            os.kill(os.getpid(), signal.SIGKILL if job["act"] == "kill" else signal.SIGINT)
        if job.get("act") == "full" and here >= job["at"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    os.replace = watched


def _child(job: dict[str, Any], stdout: Any, stderr: Any, writes: Any) -> None:
    import halfbyte.artifact.writer as writer
    import halfbyte.serving.install as install
    from halfbyte.cli.app import main

    def count() -> int:
        before = writes.tell()
        os.write(writes.fileno(), b".")
        writes.seek(0, os.SEEK_END)
        return before

    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    writer.SHARD_BYTES = SHARD_BYTES
    install.ENVIRONMENT = "no-such-environment"
    _arm(job, count)
    sys.argv = ["halfbyte", *job["words"]]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(70)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr, tempfile.TemporaryFile() as writes:
        pid = os.fork()
        if pid == 0:
            _child(job, stdout, stderr, writes)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for stream in (stdout, stderr):
            stream.seek(0)
        said, told = (stream.read().decode() for stream in (stdout, stderr))
        return {"status": status, "stdout": said, "stderr": told, "writes": os.fstat(writes.fileno()).st_size}


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401

    import halfbyte.cli.app
    import halfbyte.experiments.run  # noqa: F401

    print(json.dumps([_run(job) for job in json.loads(Path(sys.argv[1]).read_text())]))
