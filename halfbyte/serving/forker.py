"""Runs a Python command many times and imports what it needs once: a program of its own (standard library alone), run
by that command's own Python.

    python forker.py EXECUTABLE PLACE MODULES

EXECUTABLE is a Python script; MODULES, with commas between them, are imported first, where they are there. Then every
file N.json in PLACE ({"words": [...], "log": path}) becomes a fork that runs the script with these words, its output
into the log, and ends with N.code, which holds its exit status. Ends when PLACE is gone, or told to (SIGTERM), and then
takes PLACE with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import sys
import time
import traceback

POLL_S = 0.02


def main() -> None:
    executable, place, modules = sys.argv[1:4]
    sys.path[0] = os.path.dirname(executable)  # as when it is run by itself

    def leave(*_: object) -> None:
        shutil.rmtree(place, ignore_errors=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    for module in modules.split(","):
        with contextlib.suppress(Exception):  # another release has other modules; the script imports what it needs
            importlib.import_module(module)
    number = 0
    while os.path.isdir(place):
        asked = os.path.join(place, f"{number}.json")
        if not os.path.exists(asked):
            time.sleep(POLL_S)
            continue
        with open(asked, encoding="utf-8") as handle:
            job = json.load(handle)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            run(executable, job["words"], job["log"])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told = os.path.join(place, f"{number}.code")
        with open(f"{told}.tmp", "w", encoding="utf-8") as handle:
            handle.write(str(code))
        os.replace(f"{told}.tmp", told)
        number += 1


def run(executable: str, words: list[str], log: str) -> None:
    """The script, in this process, to its end; does not return."""
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = [executable, *words]
        runpy.run_path(executable, run_name="__main__")
        code = 0
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
