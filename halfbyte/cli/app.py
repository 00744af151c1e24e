"""`halfbyte`: the commands in the order that a user meets them, and the one place where errors become a line."""

from __future__ import annotations

import os
import sys

import typer

from halfbyte.cli import make, prove, serve
from halfbyte.errors import HalfbyteError

app = typer.Typer(
    name="halfbyte",
    help="From a BF16 language model to the best 4-bit checkpoint that vLLM can serve on your GPUs, with the proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("plan")(make.plan)
app.command("calibrate")(make.calibrate)
app.command("quantize")(make.quantize)
app.command("check")(prove.check)
app.command("eval")(prove.evaluate)
app.command("report")(prove.report)
app.command("serve", context_settings={"allow_extra_args": True})(serve.serve)
app.command("run")(make.run)
app.command("ls")(serve.ls)
app.command("env")(serve.env)


def _quiet_libraries() -> None:
    """Libraries' own progress bars and advice do not belong among ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    warnings.filterwarnings("ignore", module="transformers|torch|huggingface_hub")
    from transformers.utils import logging

    logging.disable_progress_bar()


def main() -> None:
    """Run the command line; exit codes: 0 done (accepted), 1 error, 2 usage, 3 a gate failed."""
    _quiet_libraries()
    try:
        app()
    except HalfbyteError as error:
        typer.echo(f"halfbyte: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("halfbyte: interrupted; the same command goes on where it was", err=True)
        sys.exit(1)
    except MemoryError:
        typer.echo("halfbyte: out of memory: free some, or calibrate with fewer or shorter sequences", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
