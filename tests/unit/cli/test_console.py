"""Progress as plain lines: a stage ends when it is done, before what is said next."""

from __future__ import annotations

from typing import Any

from halfbyte.cli.console import progress


def test_a_stage_that_is_done_ends_before_the_next_notice(capsys: Any) -> None:
    with progress() as shown:
        shown.start("comparing", 2)
        shown.advance()
        shown.say("half of it")
        shown.advance()
        shown.say("what follows from it")
        shown.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["comparing ...", "note: half of it"] and lines[3] == "note: what follows from it"
    assert lines[2].startswith("  comparing: 0.0 s") and len(lines) == 4


def test_a_stage_that_was_cut_short_ends_with_the_work(capsys: Any) -> None:
    with progress() as shown:
        shown.start("reading", 5)
        shown.advance()
    assert capsys.readouterr().err.splitlines()[-1].startswith("  reading: ")
