"""The `vllm serve` command that works for an artifact on a platform, from the platform's data and vLLM's facts."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.plan.speed import Model, beyond_noise, described, elsewhere, is_near
from halfbyte.platforms import FormatSupport, Platform, SpeedRow, SpeedTable, VllmFacts, facts_for, load_platform
from halfbyte.platforms.schema import Flags

ASSUMED_CONCURRENCY = 64
"""What a kernel is chosen for where the user names no concurrency."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GIB = 1024**3


@dataclass(frozen=True)
class ServeCommand:
    """argv of `vllm serve …`, the variables to set for it, and what the user should know about the choice."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def value(self, flag: str) -> str | None:
        """The last value given to a flag ("--port"), or None."""
        return self.flags().get(flag)

    def number(self, *flags: str) -> int:
        """The whole number that one of a flag's names is given ("--tensor-parallel-size", "-tp"); 1 where none is."""
        return next((int(value) for flag in flags if (value := self.value(flag)) and value.isdecimal()), 1)

    @property
    def tensor_parallel(self) -> int:
        """How many devices share every layer."""
        return self.number("--tensor-parallel-size", "-tp")

    def flags(self) -> Flags:
        """Every flag with its last value."""
        return dict(_pairs(self.argv[3:]))

    def run_by(self, executable: Path, *more: str) -> ServeCommand:
        """The same command run by that executable, with more words at its end."""
        return replace(self, argv=[str(executable), *self.argv[1:], *more])

    def shell(self) -> str:
        """The command for a shell, a flag a line, variables first."""
        lines = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        lines.append(shlex.join(self.argv[:3]))
        for word in self.argv[3:]:
            if _is_flag(word):
                lines.append("  " + shlex.quote(word))
            else:
                lines[-1] += " " + shlex.quote(word)
        return " \\\n".join(lines)


def serve_command(
    directory: str | Path,
    format_name: str | None,
    platform: Platform | str,
    *,
    variant: str | None = None,
    vllm_version: str | None = None,
    context: int | None = None,
    concurrency: int | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    extra: Sequence[str] = (),
    without: Collection[str] = (),
    size: Model | None = None,
) -> ServeCommand:
    """The command that serves `directory` (which may not exist yet) in a format ("gptq", …; None: BF16) on a platform.

    variant       what a format declares ("NVFP4", "pack-quantized"); None: what the directory's config says, if there.
    vllm_version  chooses facts and kernels; None: the version that the platform's evidence was taken on.
    context       --max-model-len; concurrency: --max-num-seqs, and what the kernel is chosen for.
    extra         the user's own words for vLLM; they replace ours.
    without       flags that are not taken from measured speeds.
    size          the model's: figures of one that is not near it are not told; None: all are.
    Raises UsageError when the platform cannot load the format, or a value is one that vLLM refuses or garbles.
    """
    platform = load_platform(platform) if isinstance(platform, str) else platform
    vllm_version = vllm_version or platform.vllm
    facts = facts_for(vllm_version)
    config = _read_json(Path(directory) / "config.json")
    variant = variant or declared_variant(directory) or platform.default_variant(format_name)
    support = _support(platform, format_name, variant)
    notes = [note for note in (facts.notice, support.reason) if note] + list(support.notes)

    flags: Flags = {**platform.flags, **support.flags}
    kv_cache = {**flags, **dict(_pairs(extra))}.get("--kv-cache-dtype")
    chosen, note = _kernel(platform, format_name, variant, vllm_version, concurrency, kv_cache, size)
    taken = {flag: value for flag, value in chosen.items() if flag not in without or flags.get(flag) == value}
    flags.update(taken)
    notes += [note] if note and taken == chosen else []
    limit = config.get("max_position_embeddings")
    length = context or (min(platform.context, limit or platform.context) if platform.context else None)
    sequences = concurrency or platform.concurrency
    numbers = {"--max-model-len": length, "--max-num-seqs": sequences, "--host": host, "--port": port}
    flags.update({flag: str(number) for flag, number in numbers.items() if number is not None})
    if context and limit and context > limit:
        notes.append(f"a context of {context} is beyond the {limit} positions of the model's config; vLLM may refuse")

    ours = _without_overridden(flags, extra)
    _refuse_bad_values({**ours, **dict(_pairs(extra))}, facts)
    env = {**platform.env, **support.env}
    if platform.kv_space_env:
        env = {platform.kv_space_env: str(_kv_space_gib(config, length, sequences)), **env}
    words = [word for flag, value in ours.items() for word in ((flag,) if value is None else (flag, value))]
    command = ServeCommand(["vllm", "serve", str(directory), *words, *extra], env, notes)
    return replace(command, notes=[*notes, *_open_to_others(command)])


def _open_to_others(command: ServeCommand) -> list[str]:
    """A warning where the server listens on more than this machine itself."""
    host = command.value("--host") or "127.0.0.1"
    if host in LOOPBACK or host.startswith("127."):
        return []
    guarded = command.value("--api-key") is not None
    rest = "with its --api-key, unencrypted" if guarded else "without a password: add --api-key, or a firewall"
    return [f"--host {host}: whoever reaches this machine can use the server, {rest}"]


def declared_variant(directory: str | Path) -> str | None:
    """What a checkpoint's config declares within its format: ModelOpt's quant_algo, compressed-tensors' format."""
    quantization = _read_json(Path(directory) / "config.json").get("quantization_config") or {}
    method = str(quantization.get("quant_method", ""))
    if method == "compressed-tensors":
        return quantization.get("format")
    if not method.startswith("modelopt"):
        return None
    beside = _read_json(Path(directory) / "hf_quant_config.json").get("quantization") or {}
    return quantization.get("quant_algo") or beside.get("quant_algo")


def _support(platform: Platform, format_name: str | None, variant: str | None) -> FormatSupport:
    try:
        support = platform.support(format_name, variant)
    except KeyError:
        known = ", ".join(sorted(platform.formats))
        what = f"{format_name}/{variant}" if variant else format_name
        raise UsageError(f"nothing is known of the format {what} on {platform.name}: use one of {known}") from None
    if not support.loads:
        raise UsageError(f"{platform.name} cannot load {format_name}: {support.reason} ({support.evidence})")
    return support


def _kernel(
    platform: Platform,
    format_name: str | None,
    variant: str | None,
    version: str,
    concurrency: int | None,
    kv_cache: str | None,
    size: Model | None,
) -> tuple[Flags, str]:
    """Flags for the kernel that measured fastest at the nearest concurrency, and a sentence that says by how much.

    Of each kernel the figure counts that was taken with the KV cache that is served, where there is one: which cache it
    is, is not a question of speed alone.
    """
    if format_name is None or not platform.speed:
        return {}, ""
    tables = [table for table in platform.speed if table.covers(version)]
    if not tables:
        return {}, f"no speed was measured on {platform.name} with vLLM {version}: bench before you rely on a gain"
    table = next((table for table in tables if table.rows_for(format_name, variant)), None)
    if table is None:
        return {}, f"no speed was measured for {format_name} on {platform.name}: bench before you rely on a gain"
    rows = table.rows_for(format_name, variant, kv_cache)
    wanted = concurrency or ASSUMED_CONCURRENCY
    best = table.fastest(rows, wanted)
    if table.lent or (size and not is_near(table, size)):
        others = " or ".join(row.kernel for row in rows if row is not best)
        where = elsewhere(table, size) if size else f"on {table.device}"
        over = f", rather than {others}," if others else ""
        text = f"kernel {best.kernel}{over} by a measurement {where}; what it gains here is not known"
        return best.flags, f"{text}: bench before you rely on it; {described(table)}"
    return best.flags, _speed_note(table, rows, best, table.nearest(wanted))


def _speed_note(table: SpeedTable, rows: Sequence[SpeedRow], best: SpeedRow, at: int) -> str:
    gain = table.speedup(best, at)
    unlike = len({row.kv_cache for row in rows}) > 1
    text = f"kernel {_named(best, unlike)}: {gain:.2f}x the speed of BF16 at concurrency {at}"
    if not beyond_noise(table, best, at):
        text += f" (within noise, {table.noise(at):.0%})"
    elif gain < 1:
        text += " (slower: what is gained there is memory)"
    for other in rows:
        if other is not best:
            text += f", {_against(table, best, other, at, _named(other, unlike))}"
    text += f"; {described(table)}"
    return text + (f"; {best.note}" if best.note else "")


def _named(row: SpeedRow, with_cache: bool) -> str:
    """The kernel, with the KV cache of its figure where that is not the others'."""
    said = "KV cache" in row.kernel or not with_cache
    return row.kernel if said else f"{row.kernel} (KV cache {row.kv_cache})"


def _against(table: SpeedTable, best: SpeedRow, other: SpeedRow, at: int, name: str) -> str:
    """How the two kernels compare at a concurrency, and where that is told by another one."""
    if table.differ(best, other, at):
        return f"{other.seconds[at] / best.seconds[at]:.2f}x that of {name}"
    telling = table.telling(best, other, at)
    beyond = "" if telling is None else f", {other.seconds[telling] / best.seconds[telling]:.2f}x as fast at {telling}"
    return f"no measurable difference from {name} there (noise {table.noise(at):.0%}){beyond}"


def _without_overridden(flags: Flags, extra: Sequence[str]) -> Flags:
    given = {name for name, _ in _pairs(extra)}
    given |= {"--" + name.removeprefix("--no-") for name in given if name.startswith("--no-")}
    return {flag: value for flag, value in flags.items() if flag not in given}


def _refuse_bad_values(flags: Flags, facts: VllmFacts) -> None:
    for flag, value in flags.items():
        if value is not None and f"{flag} {value}" in facts.misnomers:
            raise UsageError(f"vLLM does not know {flag} {value}: write {flag} {facts.misnomers[f'{flag} {value}']}")
    dtype = flags.get("--dtype")
    if dtype is not None and dtype not in facts.dtypes:
        raise UsageError(f"vLLM does not know --dtype {dtype}: use {', '.join(facts.dtypes)}")
    if flags.get("--kv-cache-dtype") == "float16" and dtype not in ("float16", "half"):
        raise UsageError("a float16 KV cache on a bfloat16 model gives silent nonsense: use --kv-cache-dtype auto")


def _kv_space_gib(config: dict[str, Any], context: int | None, sequences: int | None) -> int:
    """GiB of 16-bit keys and values for that many sequences of that length; 1 where the config does not tell."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    layers, kv_heads = config.get("num_hidden_layers"), config.get("num_key_value_heads") or heads
    if not (heads and width and layers and kv_heads and context and sequences):
        return 1
    head_dim = config.get("head_dim") or width // heads
    return max(1, math.ceil(4 * layers * kv_heads * head_dim * context * sequences / GIB))


def _pairs(words: Iterable[str]) -> list[tuple[str, str | None]]:
    """("--flag", value) of a command line; underscores are dashes, as vLLM reads them."""
    pairs: list[tuple[str, str | None]] = []
    for word in words:
        if _is_flag(word):
            name, equals, value = word.partition("=")
            pairs.append((name.replace("_", "-"), value if equals else None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], word)
    return pairs


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is none that can be read (the directory may be a plan, or a hub id)."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
