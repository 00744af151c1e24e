"""Asks an installed vLLM about itself: a program of its own, run by the Python of vLLM's environment.

    python ask.py QUESTIONS

QUESTIONS is JSON: {"methods": [...], "accepted": [[flag, value], ...], "refused": [[flag, value], ...]}. The last line
of the output is MARK and JSON: by question {"value": ...} or, where this release or machine cannot tell, {"why": ...}.
Places move between releases, so each question knows where the answer stood in several.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import sys
import typing
from collections.abc import Callable
from functools import partial
from typing import Any

MARK = "halfbyte-answers "
QUANT = "vllm.model_executor.layers.quantization"
KERNELS = "vllm.model_executor.kernels.linear.mixed_precision"
OLD_KERNELS = f"{QUANT}.kernels.mixed_precision"
GROUP_SIZES = {
    "Machete": (f"{QUANT}.utils.machete_utils:query_machete_supported_group_sizes",),
    "Marlin": (f"{QUANT}.utils.marlin_utils:MARLIN_SUPPORTED_GROUP_SIZES",),
    "Marlin FP4": (f"{QUANT}.utils.marlin_utils_fp4:FP4_MARLIN_SUPPORTED_GROUP_SIZES",),
    "Triton W4A16": (
        f"{KERNELS}.triton_w4a16:TRITON_W4A16_SUPPORTED_GROUP_SIZES",
        f"{OLD_KERNELS}.triton_w4a16:TRITON_W4A16_SUPPORTED_GROUP_SIZES",
    ),
    "Conch": (f"{KERNELS}.conch:_CONCH_SUPPORTED_GROUP_SIZES", f"{OLD_KERNELS}.conch:_CONCH_SUPPORTED_GROUP_SIZES"),
}
VARIANTS = {
    "modelopt": (f"{QUANT}.modelopt:QUANT_ALGOS",),
    "compressed-tensors": ("compressed_tensors.config:CompressionFormat", "compressed_tensors:CompressionFormat"),
}


def first(*places: str) -> Any:
    """What stands at the first of the places ("module:name.name") that this release has."""
    failed: list[str] = []
    for place in places:
        module, _, names = place.partition(":")
        try:
            found = importlib.import_module(module)
            for name in names.split("."):
                found = getattr(found, name)
            return found
        except (ImportError, AttributeError) as error:
            failed.append(str(error).splitlines()[0])
    raise LookupError(failed[0])


def words(value: Any) -> list[Any]:
    """The members of a Literal, an enumeration or a collection."""
    members = typing.get_args(value) or [getattr(item, "value", item) for item in value]
    return [item for item in members if isinstance(item, (str, int, float))]


def group_sizes() -> dict[str, Any]:
    def one(places: tuple[str, ...]) -> Any:
        found = first(*places)
        return words(found(importlib.import_module("torch").bfloat16) if callable(found) else found)

    return {name: told(partial(one, places)) for name, places in GROUP_SIZES.items()}


def activations(methods: list[str]) -> dict[str, Any]:
    ask = first(f"{QUANT}:get_quantization_config")

    def one(method: str) -> list[str]:
        config = ask(method)
        try:
            found = config.get_supported_act_dtypes()
        except TypeError:  # declared on instances in some releases
            found = config.get_supported_act_dtypes(config)
        return [str(dtype).removeprefix("torch.") for dtype in found]

    return {method: told(partial(one, method)) for method in methods}


def variants() -> dict[str, Any]:
    def read(places: tuple[str, ...]) -> Any:
        return words(first(*places))

    return {name: told(partial(read, places)) for name, places in VARIANTS.items()}


def parser() -> Any:
    name = "cli_args:make_arg_parser"
    make = first(f"vllm.entrypoints.launchers.{name}", f"vllm.entrypoints.openai.{name}")
    kind = first("vllm.utils.argparse_utils:FlexibleArgumentParser", "vllm.utils:FlexibleArgumentParser")
    return make(kind())


def takes(options: Any, flag: str, value: str | None) -> bool:
    """Whether `vllm serve` reads the flag with that value."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            options.parse_args(["model", flag, *([] if value is None else [value])])
        except SystemExit:
            return False
        except Exception as error:
            raise LookupError(f"{type(error).__name__}: {error}") from error
    return True


def weights_track() -> bool:
    config = first("vllm.config.load:LoadConfig", "vllm.config:LoadConfig")
    loader = first("vllm.model_executor.model_loader.default_loader:DefaultModelLoader")
    try:
        loader(config(model_loader_extra_config={"enable_weights_track": True}))
    except ValueError:
        return False
    return True


def step_tokens() -> int:
    """The default for a server on a large GPU; only such a machine can tell."""
    usage = first("vllm.usage.usage_lib:UsageContext").OPENAI_API_SERVER
    platform = first("vllm.platforms:current_platform")
    if platform.is_cpu() or platform.get_device_total_memory() < 70 << 30:
        raise LookupError("only a GPU of 70 GiB or more can tell")
    return first("vllm.engine.arg_utils:EngineArgs").get_batch_defaults(1)[0][usage]


def told(ask: Callable[[], Any]) -> dict[str, Any]:
    """The answer, or why there is none: a release may raise anything where something moved."""
    try:
        return {"value": ask()}
    except Exception as error:
        return {"why": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def answers(asked: dict[str, Any]) -> dict[str, Any]:
    options: list[Any] = []

    def shared() -> Any:
        if not options:
            options.append(parser())
        return options[0]

    def pair(flag: str, value: str) -> Any:
        return takes(shared(), flag, value)

    def pairs(key: str) -> dict[str, Any]:
        return {f"{f} {v}" if v else f: told(partial(pair, f, v)) for f, v in asked[key]}

    there = told(lambda: first("vllm:__name__"))
    if "value" not in there:
        return {"vllm": there}
    return {
        "vllm": there,
        "torch": told(lambda: importlib.metadata.version("torch")),
        "dtypes": told(lambda: words(first("vllm.config.model:ModelDType", "vllm.config:ModelDType"))),
        "kv_cache_dtypes": told(lambda: words(first("vllm.config.cache:CacheDType", "vllm.config:CacheDType"))),
        "gpu_memory_utilization": told(lambda: float(first("vllm.engine.arg_utils:EngineArgs.gpu_memory_utilization"))),
        "step_tokens": told(step_tokens),
        "weights_track": told(weights_track),
        "methods": told(lambda: words(first(f"{QUANT}:QUANTIZATION_METHODS"))),
        "kernel_group_sizes": told(group_sizes),
        "activations": told(lambda: activations(asked["methods"])),
        "variants": told(variants),
        "accepted": told(lambda: pairs("accepted")),
        "refused": told(lambda: pairs("refused")),
    }


if __name__ == "__main__":
    print(MARK + json.dumps(answers(json.loads(sys.argv[1])), default=str))
