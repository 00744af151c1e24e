"""README.md of an artifact: the model card in the Hub's conventions, filled from results and nothing else.

Front matter as in https://huggingface.co/docs/hub/model-cards: base_model, base_model_relation: quantized, tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from halfbyte.artifact import card_tables
from halfbyte.artifact.markdown import code, fence, finite, md

METHODS = {
    "rtn": "round-to-nearest",
    "gptq": "GPTQ (second-order rounding)",
    "awq": "AWQ (activation-aware scaling)",
    "nvfp4": "NVFP4 (FP4 numbers with FP8 block scales)",
}
LICENCE = ("license", "license_name", "license_link")
MOST_NOTICES = 5
TAGS = {"gptq": "gptq", "awq": "awq", "modelopt": "modelopt", "compressed-tensors": "compressed-tensors"}


def model_card(
    manifest: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    served: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
    commands: Mapping[str, str] | None = None,
    *,
    tasks: Mapping[str, Any] | None = None,
    long_context: Mapping[str, Any] | None = None,
    bench: Mapping[str, Any] | None = None,
    stability: Mapping[str, Any] | None = None,
) -> str:
    """The card's text from halfbyte.json, the result files of these names, and serve commands by platform (that name
    the artifact's directory as `.`).

    What was not measured is said to be so. Text from outside is escaped, so that it can add no markup.
    """
    name = base_model(manifest)
    sections = [
        _front_matter(manifest, name),
        f"# {md(_short(name))}, 4-bit ({md(_recipe_words(manifest))})",
        _opening(manifest, name, gates),
        "\n\n".join(["## Recovery", *card_tables.fidelity(evaluation), *card_tables.tasks(tasks)]),
        _section("## Long context", card_tables.long_context(long_context)),
        _section("## Speed", card_tables.speed(bench)),
        _deployment(served, commands),
        _making(manifest),
        _limitations(manifest, evaluation, served, tasks, bench, stability),
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def base_model(manifest: Mapping[str, Any]) -> str:
    """What the artifact was made of, as the user named it: a hub id or a directory."""
    model = manifest.get("model")
    found = model.get("hub_id") or model.get("name") or model.get("path") if isinstance(model, Mapping) else model
    return str(found) if found else "unknown"


def _front_matter(manifest: Mapping[str, Any], name: str) -> str:
    recipe = manifest.get("recipe") or {}
    tags = ["4-bit", "quantized", "vllm", "halfbyte", TAGS.get(str(recipe.get("format")), "")]
    fields: dict[str, Any] = {"base_model": name} if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else {}
    model = manifest.get("model")
    licence = model.get("license") if isinstance(model, Mapping) else None
    if isinstance(licence, Mapping):
        fields |= {key: str(licence[key]) for key in LICENCE if licence.get(key)}
    fields |= {
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in tags if tag],
    }
    if recipe.get("method") == "nvfp4":
        fields["tags"].append("nvfp4")
    body = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n{body}---"


def _opening(manifest: Mapping[str, Any], name: str, gates: Mapping[str, Any] | None) -> str:
    facts = [f"A 4-bit version of {code(name)} for vLLM, made with halfbyte."]
    size, bits = finite(manifest.get("bytes")), finite(manifest.get("bits_per_weight"))
    if size is not None:
        facts.append(f"Its weights take {size / 2**30:.3g} GiB.")
    if bits is not None:
        facts.append(f"Quantized linears take {bits:.2f} bits a weight, scales counted.")
    words, verdict = (gates or {}).get("text"), (gates or {}).get("verdict")
    told = words or (f"Verdict: {verdict}." if verdict else "")
    return " ".join(facts) + (f"\n\n{md(told)}" if told else "")


def _section(title: str, parts: list[str]) -> str:
    return "\n\n".join([title, *parts]) if parts else ""


def _deployment(served: Mapping[str, Any] | None, commands: Mapping[str, str] | None) -> str:
    blocks = [f"On {md(platform)}:\n\n{fence(line, 'bash')}" for platform, line in (commands or {}).items()]
    if blocks:
        blocks.insert(0, "In this directory; elsewhere put its path, or its name on the Hub, in the place of the dot.")
    else:
        blocks = [fence("vllm serve <this directory>", "bash")]
    if served and served.get("status") == "served":
        outcome = "and its perplexity agreed" if served.get("passed") else "and its perplexity DID NOT agree"
        difference = finite(served.get("relative_difference"))
        by = "" if difference is None else f" ({abs(difference):.2%} apart)"
        blocks.append(f"Loaded in vLLM {md(served.get('vllm'))}, {outcome} with the same weights in transformers{by}.")
    else:
        reason = f": {md(served['reason'])}" if served and served.get("reason") else ""
        blocks.append(f"Not yet served in vLLM{reason}.")
    return "## Deployment\n\n" + "\n\n".join(blocks)


def _making(manifest: Mapping[str, Any]) -> str:
    recipe = manifest.get("recipe") or {}
    calibration = manifest.get("calibration") or {}
    lines = [f"- recipe: {code(yaml.safe_dump(dict(recipe), default_flow_style=True, width=10**6, sort_keys=False))}"]
    if isinstance(calibration, Mapping) and calibration.get("source"):
        lines.append(f"- calibration: {md(_calibration_words(calibration))}")
    if isinstance(calibration, Mapping) and calibration.get("sha256"):
        lines.append(f"- calibration tokens, SHA-256: {md(calibration['sha256'])}")
    experts = manifest.get("experts")
    if isinstance(experts, Mapping) and experts:
        lines.append(f"- experts: {_experts_words(experts)}; routers stay in BF16")
    versions = manifest.get("versions") or {}
    if versions:
        lines.append("- versions: " + ", ".join(f"{md(k)} {md(v)}" for k, v in versions.items() if v))
    lines.append("- everything else (per-linear errors, hashes, times, commands): `halfbyte.json` beside this file")
    return "## How it was made\n\n" + "\n".join(lines)


def _experts_words(experts: Mapping[str, Any]) -> str:
    """How the calibration tokens were spread over the experts."""
    counts = [count for row in experts.values() for count in row["tokens"]]
    starved = sum(len(row["starved"]) for row in experts.values())
    few = f"; {starved} got too few for statistics of their own alone" if starved else ""
    return f"{len(counts)} in {len(experts)} blocks, {min(counts):,} to {max(counts):,} calibration tokens each{few}"


def _calibration_words(calibration: Mapping[str, Any]) -> str:
    """How much text of which kind, as a calibration set's manifest states it."""
    source, tokens = calibration["source"], finite(calibration.get("tokens"))
    if not isinstance(source, Mapping):
        return str(source)
    amount = "text" if tokens is None else f"{tokens:,.0f} tokens"
    if source.get("kind") == "self-generated":
        return f"{amount} that the base model wrote itself"
    files = source.get("files")
    names = [str(file.get("file")) for file in files if isinstance(file, Mapping)] if isinstance(files, list) else []
    return f"{amount} of {', '.join(names)}" if names else f"{amount} ({source.get('kind', 'source not stated')})"


def _limitations(
    manifest: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    served: Mapping[str, Any] | None,
    tasks: Mapping[str, Any] | None,
    bench: Mapping[str, Any] | None,
    stability: Mapping[str, Any] | None,
) -> str:
    recipe = manifest.get("recipe") or {}
    lines = ["Four bits lose something: compare with the base model on your own task before you rely on it."]
    if not (evaluation or {}).get("metrics"):
        lines.append("Its fidelity was not measured.")
    elif (evaluation or {}).get("self_generated"):
        lines.append("Fidelity was measured on text that the base model wrote itself, not on text of a domain.")
    if not served or served.get("status") != "served":
        lines.append("It was not loaded in vLLM when this card was written.")
    missing = [name for name, result in {"tasks": tasks, "speed": bench}.items() if not result]
    if missing:
        lines.append(f"Not measured: {' and '.join(missing)}.")
    reasons = [md(reason) for reason in (stability or {}).get("reasons") or []]
    if stability and not stability.get("ok"):
        lines.append(f"Long answers were NOT stable: {'; '.join(reasons) or 'no reason is stated'}.")
    notices = [md(notice) for notice in manifest.get("notices") or []]
    lines += [f"While it was made: {notice}." for notice in notices[:MOST_NOTICES]]
    if len(notices) > MOST_NOTICES:
        lines.append(f"{len(notices) - MOST_NOTICES} further notices stand in `halfbyte.json`.")
    if recipe.get("method") == "nvfp4":
        lines.append(
            "NVFP4 needs an NVIDIA GPU in vLLM; on Hopper a serve-time flag chooses the kernel and so the speed."
        )
    lines.append("Uses, biases and licence are those of the base model.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _recipe_words(manifest: Mapping[str, Any]) -> str:
    recipe = manifest.get("recipe") or {}
    method = METHODS.get(str(recipe.get("method")), str(recipe.get("method") or "method not stated"))
    group = recipe.get("group_size")
    return method if group is None else f"{method}, {'one group a row' if group == -1 else f'group {group}'}"


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1] or name
