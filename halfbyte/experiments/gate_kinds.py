"""What gates there are (gates.yaml), and how one is read from the words of a user: `ppl=+5%`, `speed@16=+20%`."""

from __future__ import annotations

import difflib
import functools
import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import yaml
from pydantic import Field

from halfbyte.errors import UsageError
from halfbyte.platforms import Data

OFF = ("off", "none")
GIB = "GiB"
NAME = re.compile(r"([a-z_0-9]+)(?:([:@])(.*))?")


class Part(Data):
    """One number under a gate. `kv`: it counts only where that KV cache is served."""

    label: str
    value: str
    kv: str | None = None


class Kind(Data):
    """What a gate's name means: a row of gates.yaml, where the fields are explained."""

    label: str
    file: str
    option: str = ""
    reader: str = "number"
    value: str = ""
    parts: dict[str, Part] = Field(default_factory=dict)
    minus: float = 0.0
    unit: Literal["%", "nats", "GiB", ""] = ""
    signed: bool = False
    keep: Literal["at most", "at least"] = "at most"
    range: tuple[float, float] = (0.0, math.inf)
    words: tuple[str, ...] = ()
    argument: Literal["", ":", "@"] = ""
    example: str
    advice: str = ""
    default: str = ""
    source: str

    @property
    def structural(self) -> bool:
        """Whether it passes or not, without a limit."""
        return not self.unit

    def pieces(self) -> dict[str, Part]:
        """Its numbers by what is added to the gate's name."""
        return self.parts or {"": Part(label=self.label, value=self.value)}


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every kind of gate by name."""
    text = resources.files("halfbyte.experiments").joinpath("gates.yaml").read_text(encoding="utf-8")
    return {name: Kind.model_validate(row) for name, row in yaml.safe_load(text).items()}


@dataclass(frozen=True)
class Gate:
    """One limit.

    limit    None: passed or not (check, served), a limit in a `word` ("fits"), or with `off` a default that is dropped
    stated   the user asked for it: what is then not measured does not pass
    """

    name: str
    limit: float | None
    off: bool = False
    word: str = ""
    stated: bool = False

    @property
    def kind(self) -> Kind:
        return kinds()[self.family]

    @property
    def family(self) -> str:
        """Its name without what stands behind : or @."""
        return re.split("[:@]", self.name)[0]

    @property
    def argument(self) -> str:
        """What stands behind : or @ in its name: a task, a concurrency."""
        return self.name[len(self.family) + 1 :]

    @property
    def label(self) -> str:
        return self.kind.label.replace("{arg}", self.argument)

    @property
    def spelled(self) -> str:
        """The gate as it is written behind --gate."""
        return self.name if self.kind.structural else f"{self.name}={self.spell()}"

    def spell(self) -> str:
        """The limit as the user writes it: +5%, 90%, 0.1, 40GiB, fits."""
        if self.off:
            return "off"
        return self.word or ("yes" if self.limit is None else spell(self.kind, self.limit))


def default_gates() -> tuple[str, ...]:
    """The gates that hold unless the user says otherwise, as the user would write them."""
    rows = [(name, kind.default) for name, kind in kinds().items() if kind.default]
    return tuple(limit if "=" in limit else f"{name}={limit}" for name, limit in rows)


def parse_gate(text: str) -> Gate:
    """A gate from `ppl=+5%`, `task:NAME=-1%`, `memory@64=fits`, `served` or `top1=off`. Raises UsageError in one
    line."""
    name, equals, limit = (part.strip() for part in text.partition("="))
    kind = _kind(text, name)
    if limit in OFF:
        return Gate(name, None, off=True)
    if kind.structural:
        if limit not in ("", "yes"):
            raise UsageError(f"--gate {text}: {name} takes no limit: write --gate {name}, or {name}=off")
        return Gate(name, None)
    if limit in kind.words:
        return Gate(name, None, word=limit)
    return Gate(name, _limit(text, kind, limit if equals else ""))


def _kind(text: str, name: str) -> Kind:
    """The kind that a gate's name spells. Raises UsageError for an unknown one, or an argument that is missing."""
    found = NAME.fullmatch(name)
    family, mark, argument = found.groups() if found else (name, None, None)
    kind = kinds().get(family)
    if kind is None:
        close = difflib.get_close_matches(family, kinds(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(kinds())}"
        raise UsageError(f"--gate {text}: unknown gate {family!r}: {hint}")
    whole = bool(argument) and (kind.argument != "@" or (str(argument).isdecimal() and int(str(argument)) > 0))
    if (mark or "") != kind.argument or (kind.argument and not whole):
        raise UsageError(f"--gate {text}: {name!r} is no gate: write it as {kind.example}")
    return kind


def _limit(text: str, kind: Kind, limit: str) -> float:
    percent, gib = limit.endswith("%"), limit.casefold().endswith("gib")
    digits = limit[:-1] if percent else limit[:-3] if gib else limit
    wrong = f"--gate {text}: {limit!r} is no limit for {kind.label.replace(' {arg}', '')}: write it as {kind.example}"
    try:
        number = float(digits) / (100 if percent else 1)
    except ValueError:
        raise UsageError(wrong) from None
    is_share = kind.unit == "%" and kind.range == (0, 1) and 0 <= number <= 1
    right_unit = is_share or (percent == (kind.unit == "%") and (not gib or kind.unit == GIB))
    if not math.isfinite(number) or not right_unit:
        raise UsageError(wrong)
    low, high = kind.range
    if not low <= number <= high:
        least, most = spell(kind, low), spell(kind, high)
        between = f"between {least} and {most}" if math.isfinite(high) else f"{least} or more"
        raise UsageError(f"--gate {text}: the limit is {between}: write it as {kind.example}")
    return number


def spell(kind: Kind, value: float) -> str:
    """A number in the unit of a kind."""
    if kind.unit == "%":
        number = f"{100 * value:{'+' if kind.signed else ''}.2f}".rstrip("0").rstrip(".")
        return f"{number}%"
    return f"{value:.4g}{kind.unit if kind.unit == GIB else ''}"
