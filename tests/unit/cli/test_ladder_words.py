"""The ladder at the end of `run`: values are written as their gates are."""

from __future__ import annotations

from halfbyte.cli.words import ladder_lines


def test_a_step_shows_its_values_as_gates_are_written() -> None:
    row = {"changes": {"group_size": [64, 32]}, "title": "smaller groups", "verdict": "closer, not enough"}
    row |= {"cost": {"seconds": 265.6, "bytes_added": 4147200}}
    row |= {"before": {"ppl": 0.1296, "kl": 0.21}, "after": {"ppl": 0.0926, "kl": 0.1234567}}
    assert ladder_lines({"ladder": [row]})[1:] == [
        "  group_size 64 -> 32: closer, not enough (ppl +12.96% -> +9.26%, kl 0.21 -> 0.1235; 266 s, +4.0 MiB)"
    ]
    assert ladder_lines({"ladder": [{**row, "changes": {}, "after": {}}]})[1:] == [
        "  smaller groups: closer, not enough"
    ]
