"""`halfbyte`: the commands in the order that a user meets them, and the one place where errors become a line."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

import halfbyte
from halfbyte.cli import bench, calibrate, make, prove, push, reproduce, sensitivity, serve, sweep
from halfbyte.errors import HalfbyteError

_CLICK: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""The base of typer's own usage errors, in whichever click it carries."""
_INTERRUPTED = 130
"""What typer returns for Ctrl-C instead of raising KeyboardInterrupt."""
DEBUG = "HALFBYTE_DEBUG"
"""Set, it shows where an error that nobody foresaw was raised."""

app = typer.Typer(
    name="halfbyte",
    help="From a BF16 language model to the best 4-bit checkpoint that vLLM can serve on your GPUs, with the proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"halfbyte {halfbyte.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print halfbyte's version, and end.")
    ] = False,
) -> None:
    """Options that stand before a command."""


app.command("plan", short_help="What to make of a model and why; no weight is read.")(make.plan)
app.command("calibrate", short_help="Build a calibration set.")(calibrate.calibrate)
app.command("quantize", short_help="Make one 4-bit checkpoint.")(make.quantize)
app.command("check", short_help="Prove that an artifact is whole; --serve: in real vLLM.")(prove.check)
app.command("eval", short_help="Measure what 4 bits lost against BF16.")(prove.evaluate)
app.command(
    "bench", short_help="Speed in real vLLM against BF16, per concurrency.", context_settings={"allow_extra_args": True}
)(bench.bench)
app.command("tune", short_help="The fastest vLLM flags on this machine.", context_settings={"allow_extra_args": True})(
    bench.tune
)
app.command("sensitivity", short_help="The damage each linear group does alone, ranked.")(sensitivity.sensitivity)
app.command("sweep", short_help="The experiment matrix: many recipes, ranked; shared work done once.")(sweep.sweep)
app.command("report", short_help="A run's results as HTML and Markdown.")(prove.report)
app.command(
    "serve", short_help="Print or run the vLLM command that works.", context_settings={"allow_extra_args": True}
)(serve.serve)
app.command("run", short_help="The main job: all of the above in one.")(make.run)
app.command("reproduce", short_help="Make an artifact again and compare hashes.")(reproduce.reproduce)
app.command("push", short_help="Publish an artifact on the Hugging Face Hub; private unless asked.")(push.push)
app.command("ls", short_help="List recipes, platforms, methods or matrices.")(serve.ls)
app.command("env", short_help="Versions, the machine, the vLLM that is found.")(serve.env)


def _quiet_libraries() -> None:
    """Libraries' own progress bars and advice do not belong among ours. They read this when they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    warnings.filterwarnings("ignore", module="transformers|torch|huggingface_hub")


def main() -> None:
    """Run the command line; exit codes: 0 done (accepted), 1 error, 2 usage, 3 a gate failed."""
    try:
        _quiet_libraries()
        status = app(prog_name="halfbyte", standalone_mode=False)
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
    except HalfbyteError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it was", 1)
    except MemoryError:
        _fail("out of memory: free some, or calibrate with fewer or shorter sequences", 1)
    except _CLICK as error:
        _refuse(error)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (a fault of halfbyte's: {DEBUG}=1 shows where)", 1)
    sys.exit(status or 0)


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.echo(f"halfbyte: {' '.join(message.splitlines())}", err=True)
    sys.exit(exit_code)


def _refuse(error: Any) -> NoReturn:
    """A usage error of typer's: a wrong or missing option in a line, the help where no command was named."""
    message = error.format_message()
    if message.startswith("Usage:"):
        typer.echo(message, err=True)
        sys.exit(error.exit_code)
    context = getattr(error, "ctx", None)
    _fail(f"{message.rstrip('.')} ({context.command_path if context else 'halfbyte'} --help)", error.exit_code)


if __name__ == "__main__":
    main()
