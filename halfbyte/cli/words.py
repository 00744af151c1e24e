"""Results in a few lines for a terminal: path, size, bits a weight, worst linear, the next command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20


def artifact_words(directory: Path, manifest: dict[str, Any]) -> str:
    """The last lines of `quantize`."""
    return f"{size_line(directory, manifest)}\n{worst_line(manifest)}\nnext: halfbyte check {directory} --serve"


def size_line(directory: Path, manifest: dict[str, Any]) -> str:
    """Path, bytes and bits a quantized weight."""
    before, after = manifest["bytes_bf16"] / MIB, manifest["bytes"] / MIB
    bits = manifest["bits_per_weight"]
    return f"{directory}: {after:,.0f} MiB (BF16: {before:,.0f} MiB), {bits:.3f} bits a quantized weight"


def worst_line(manifest: dict[str, Any]) -> str:
    """The linear with the largest relative output error."""
    errors = {n: row["error"]["relative"] for n, row in manifest["linears"].items() if row["scheme"]}
    worst = max(errors, key=lambda n: errors[n])
    mean = sum(errors.values()) / len(errors)
    return f"output error: {mean:.2%} on average, worst {errors[worst]:.2%} in {worst}"


def check_words(
    directory: Path,
    result: dict[str, Any],
    served: dict[str, Any] | None,
    text: Sequence[Path] = (),
    output: Path | None = None,
) -> str:
    """What `check` found."""
    lines = []
    for found in result["findings"]:
        where = "" if found["message"].startswith(found["where"]) else found["where"]
        lines.append(": ".join(word for word in (found["code"], where, found["message"]) if word))
    verdict = "is sound" if result["ok"] else f"is damaged ({len(lines)} finding{'s' * (len(lines) != 1)})"
    lines.append(f"{directory} {verdict}: {result['tensors']} tensors, {result['bytes'] / MIB:,.0f} MiB")
    if served is not None:
        lines.append(served_line(served))
    if not result["ok"]:
        lines.append("next: the command that made it, with --force")
    elif served is None or served["passed"]:
        more = "".join(f" --text {file}" for file in text) + (f" -o {output}" if output else "")
        lines.append(f"next: halfbyte eval {directory}{more}")
    return "\n".join(lines)


def served_line(served: dict[str, Any]) -> str:
    """What vLLM made of the artifact."""
    if served["status"] != "served":
        return f"not served: {served['reason']}"
    apart = f"{served['relative_difference']:.2%} apart (limit {served['limit']:.1%})"
    figures = f"perplexity {served['ppl_served']:.3f}, reference {served['ppl_reference']:.3f}, {apart}"
    said = " ".join(str(served["completion"]).split())[:60]
    verdict = "agrees" if served["passed"] else f"does NOT agree: {served['reason']}"
    return f"served by vLLM {served['vllm']}: {verdict}; {figures}; it says: {said!r}"


def eval_words(result: dict[str, Any]) -> str:
    """The fidelity table."""
    names = {
        "ppl_baseline": "perplexity, BF16",
        "ppl": "perplexity, 4-bit",
        "ppl_ratio": "perplexity, ratio",
        "kl_mean": "KL, mean (nats)",
        "kl_median": "KL, median",
        "kl_p99": "KL, p99",
        "kl_p999": "KL, p99.9",
        "top1": "top-1 agreement",
        "flips": "right or wrong, changed",
        "loglik_gap": "log-likelihood lost",
    }
    text, floor = result["text"], result["noise_floor"]
    shape = f"{text['windows']} windows of up to {text['window']}, stride {text['stride']}"
    lines = [f"{text['source']}: {shape}, {text['tokens']:,} scored tokens", ""]
    lines.append(f"{'':24}{'value':>10}  {'95 % interval':^23}  {'noise floor':>11}")
    for key, label in names.items():
        if key not in result["metrics"]:
            continue
        m = result["metrics"][key]
        noise = f"{floor[key]:>11.4g}" if key in floor else ""
        lines.append(f"{label:24}{m['value']:>10.4f}  {m['low']:>10.4f} .. {m['high']:<10.4f} {noise}")
    return "\n".join(lines)


def run_words(directory: Path, result: dict[str, Any]) -> str:
    """The end of `run`: the verdict first, then the evidence, then what to do next."""
    manifest, gates = result["manifest"], result["gates"]
    lines = [gates["text"], "", eval_words(result["eval"]), "", size_line(directory / "model", manifest)]
    lines += [worst_line(manifest), served_line(result["served"]), ""]
    if result.get("mitigation"):
        lines += [*ladder_lines(result["mitigation"]), ""]
    if not result["fresh"]:
        lines.append(f"everything was there already; looked through in {result['seconds']:.1f} s")
    lines.append(f"report: {directory / 'report.html'} (and report.md)")
    platforms = result["plan"]["request"]["platforms"]
    if gates["verdict"] == "rejected":
        lines.append("next: another recipe (halfbyte ls recipes), more calibration text (--text), or a budget (--gate)")
    else:
        kept = ((result.get("mitigation") or {}).get("final") or {}).get("candidate", {}).get("kv_cache")
        more = f" -- --kv-cache-dtype {kept}" if kept else ""
        lines.append(f"next: halfbyte serve {directory / 'model'} --on {platforms[0]}{more}")
    return "\n".join(lines)


def ladder_lines(mitigation: dict[str, Any]) -> list[str]:
    """The steps of the mitigation ladder that were made, a line each."""
    from halfbyte.experiments.gate_kinds import Gate, spell
    from halfbyte.experiments.mitigation import change_words

    lines = ["mitigation, step by step:"]
    for row in mitigation["ladder"]:
        cost = row["cost"]
        paid = f"{cost['seconds']:.0f} s, {cost['bytes_added'] / MIB:+.1f} MiB"
        moved = []
        for name, value in row["after"].items():
            before, after = (spell(Gate(name, None).kind, x) for x in (row["before"][name], value))
            moved.append(f"{name} {before} -> {after}")
        did = change_words(row["changes"]) or row["title"]
        lines.append(f"  {did}: {row['verdict']}" + (f" ({', '.join(moved)}; {paid})" if moved else ""))
    return lines
