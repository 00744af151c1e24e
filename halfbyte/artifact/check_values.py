"""The part of the check that reads the weights: finite numbers, scales, what is shared, what dequantizes to what.

One module's tensors are in memory at a time, read from memory-mapped files.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from halfbyte.algo import dequantize
from halfbyte.artifact.check_files import Inventory
from halfbyte.artifact.findings import Findings
from halfbyte.artifact.fingerprint import fingerprint_holds, tensor_digest
from halfbyte.errors import HalfbyteError
from halfbyte.formats import Format, scale_groups
from halfbyte.models import TensorInfo
from halfbyte.types import Progress, QuantizedLinear, Scheme

_SCALES = ("scales", "weight_scale", "weight_scale_2", "weight_global_scale", "input_scale")
_SHARED = ("weight_scale_2", "weight_global_scale", "input_scale")


def check_values(
    inventory: Inventory,
    kept_as: Format | None,
    schemes: dict[str, Scheme | None],
    chosen: dict[str, Any],
    digests: dict[str, str],
    progress: Progress,
    findings: Findings,
) -> None:
    """Check the numbers of every tensor in `inventory`; findings go to `findings`.

    kept_as   the format, or None where the config could not be read (then only finite values are checked)
    schemes   every linear's scheme by the config; chosen: the manifest's entry of each linear
    digests   the manifest's digest of each tensor; empty where it has none
    """
    modules: dict[str, list[TensorInfo]] = {}
    for name, info in sorted(inventory.tensors.items()):
        modules.setdefault(name.rpartition(".")[0], []).append(info)
    progress.start("values", len(modules))
    shared: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        reader = _Reader(stack)
        for module, infos in modules.items():
            progress.advance(1, module)
            try:
                tensors = {info.name: reader.load(info) for info in infos}
            except (OSError, SafetensorError) as error:
                findings.add("header", module, f"cannot be read: {error}")
                continue
            scheme = schemes.get(module)
            _unchanged(tensors, digests, findings)
            sound = _numbers(tensors, scheme, findings)
            if kept_as is not None and scheme is not None:
                ends = ((kind, tensors.get(f"{module}.{kind}")) for kind in _SHARED)
                shared[module] = {k: float(t) for k, t in ends if t is not None and t.numel() == 1}
                if sound:
                    _dequantized(kept_as, module, tensors, scheme, chosen.get(module, {}), findings)
    _sharing(shared, findings)


def _unchanged(tensors: dict[str, torch.Tensor], digests: dict[str, str], findings: Findings) -> None:
    for name, tensor in tensors.items():
        if name in digests and tensor_digest(tensor) != digests[name]:
            findings.add("tensor-changed", name, "its dtype, shape or bytes are not those that were written")


def _numbers(tensors: dict[str, torch.Tensor], scheme: Scheme | None, findings: Findings) -> bool:
    sound = True
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
        bad = int(values.numel() - torch.isfinite(values).sum())
        if bad:
            findings.add("not-finite", name, f"{bad:,} of {values.numel():,} values are NaN or infinite")
            sound = False
        elif scheme is not None and name.rpartition(".")[2] in _SCALES:
            zero_too = scheme.grid == "nvfp4" and name.endswith(".weight_scale")
            wrong = int((values < 0).sum() if zero_too else (values <= 0).sum())
            if wrong:
                rule = "negative" if zero_too else "not positive"
                findings.add("scale-sign", name, f"{wrong:,} of {values.numel():,} scales are {rule}")
    return sound


def _dequantized(
    kept_as: Format,
    module: str,
    tensors: dict[str, torch.Tensor],
    scheme: Scheme,
    entry: dict[str, Any],
    findings: Findings,
) -> None:
    was = entry.get("scheme")
    try:
        q = kept_as.unpack(module, tensors, scheme)
        weight = dequantize(q)
    except KeyError:
        return  # a missing tensor, which is a finding already
    except (HalfbyteError, ValueError, IndexError, RuntimeError) as error:
        findings.add("dequantize", module, str(error))
        return
    if not bool(torch.isfinite(weight).all()):
        findings.add("not-finite", module, "the dequantized weight holds NaN or infinity")
    if entry.get("fingerprint") and not fingerprint_holds(q, str(entry["fingerprint"])):
        findings.add("dequantize", module, "the weight does not dequantize to what the quantizer chose")
    if isinstance(was, dict) and q.grid == "nvfp4" and not _shares_blocks(q, was.get("group_size")):
        findings.add("sharing", module, f"blocks of one group of {was['group_size']} have different scales")


def _sharing(shared: dict[str, dict[str, float]], findings: Findings) -> None:
    for fused, shards in scale_groups(shared).items():
        for kind in _SHARED:
            values = {shared[s][kind] for s in shards if kind in shared[s]}
            if len(values) > 1:
                findings.add("sharing", fused, f"{kind} differs between {', '.join(shards)}: vLLM takes one")


def _shares_blocks(q: QuantizedLinear, group_size: Any) -> bool:
    """Whether neighbouring blocks have one scale wherever the recipe let `group_size` columns share it."""
    if not isinstance(group_size, int) or group_size <= q.group_size or q.in_features % group_size:
        return True
    groups = q.scales.unflatten(1, (-1, group_size // q.group_size))
    return bool((groups == groups[:, :, :1]).all())


class _Reader:
    """Tensors from memory-mapped files, each opened once."""

    def __init__(self, stack: ExitStack):
        self.stack, self.handles = stack, dict[Path, Any]()

    def load(self, info: TensorInfo) -> torch.Tensor:
        if info.file not in self.handles:
            self.handles[info.file] = self.stack.enter_context(safe_open(info.file, framework="pt"))
        return self.handles[info.file].get_tensor(info.name)
