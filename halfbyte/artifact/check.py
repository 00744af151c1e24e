"""The check of an artifact: would vLLM read from these files what the quantizer chose?

Codes of findings, which stay as they are:
    config             config.json, its quantization_config or a file beside it is missing, wrong or contradicts itself
    manifest           halfbyte.json is missing or does not say what is to be compared
    header, index      a weight file is truncated or malformed; the shard index and the files disagree
    hash               a file is not the one that the manifest lists
    foreign            a file that a loader may read and that the manifest does not list
    tensor-missing, tensor-unexpected, dtype, shape    against what the config makes vLLM look for
    not-finite, scale-sign    NaN or infinity; a scale that is not positive
    sharing            a scale that differs where vLLM takes one for several linears
    dequantize         a linear does not dequantize to what the quantizer chose
    tensor-changed     a tensor's dtype, shape or bytes are not those that were written
    tokenizer          no tokenizer, or more tokens than embeddings
One linear is in memory at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.artifact.check_files import (
    MANIFEST,
    Inventory,
    check_foreign,
    check_hashes,
    check_recipe,
    check_seal,
    check_tokenizer,
    read_object,
    take_inventory,
)
from halfbyte.artifact.check_values import check_values
from halfbyte.artifact.findings import Findings
from halfbyte.artifact.writer import work_of
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import DTYPES
from halfbyte.formats import Format, columns, detect_format
from halfbyte.models import Family, family_of, unfuse
from halfbyte.models.checkpoint import read_json
from halfbyte.types import Progress, Quiet, Scheme

_BROKEN = (HalfbyteError, ValueError, TypeError, KeyError, AttributeError, IndexError, re.error)
"""What reading a config or tensors that someone damaged may raise."""
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class _Wanted:
    """One tensor that vLLM will look for. `dtypes`: names that it may have, as safetensors spells them."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False


def check_artifact(directory: Path, progress: Progress | None = None) -> dict:
    """Check an artifact's structure and numbers; the result is check.json (schema 1).

    Never raises for a bad artifact: what is wrong is a finding. Raises UsageError where `directory` is none.
    """
    directory = Path(directory)
    _refuse_other(directory)
    check = _Check(directory, progress or Quiet())
    check.run()
    listed = check.findings.listed()
    return {
        "schema": 1,
        "kind": "check",
        "path": str(directory),
        "ok": not listed,
        "tensors": len(check.inventory.tensors),
        "bytes": sum(info.nbytes for info in check.inventory.tensors.values()),
        "findings": listed,
    }


def _refuse_other(directory: Path) -> None:
    """A directory that is something else than an artifact gets one line instead of findings."""
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: name the artifact's directory")
    if (directory / MANIFEST).exists():
        return
    if work_of(directory) is not None:
        raise UsageError(f"{directory} is a half-done artifact: run the command that began it again, it goes on")
    if (directory / "model" / MANIFEST).is_file():
        raise UsageError(f"{directory} is the directory of a run: its artifact is {directory / 'model'}")
    config = directory / "config.json"
    if not config.is_file():
        raise UsageError(
            f"{directory} is no artifact (no {MANIFEST}, no config.json): name a directory that quantize wrote"
        )
    try:
        quantized = "quantization_config" in read_json(config)
    except HalfbyteError:
        return
    if not quantized:
        raise UsageError(
            f"{directory} is a model that is not quantized: make an artifact of it with `halfbyte quantize`"
        )


class _Check:
    """The state of one check."""

    def __init__(self, directory: Path, progress: Progress):
        self.directory, self.progress, self.findings = directory, progress, Findings()
        self.inventory = Inventory()
        self.chosen: dict[str, Any] = {}
        self.malformed: set[str] = set()

    def run(self) -> None:
        config = read_object(self.directory / "config.json", "config", self.findings)
        manifest = read_object(self.directory / MANIFEST, "manifest", self.findings)
        self.inventory = take_inventory(self.directory, self.findings)
        digests: dict[str, str] = {}
        if manifest:
            digests = check_seal(manifest, self.findings)
            check_hashes(self.directory, manifest, self.progress, self.findings)
            check_foreign(self.directory, manifest, self.findings)
            check_recipe(self.directory, manifest, self.findings)
            self.chosen = self._choices(manifest)
        shapes = self._model_shapes(config) if config else {}
        rows = next((shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
        check_tokenizer(self.directory, rows, self.findings)
        kept_as, schemes = self._structure(config, shapes) if shapes else (None, {})
        readable = {n: s for n, s in schemes.items() if n not in self.malformed}
        check_values(self.inventory, kept_as, readable, self.chosen, digests, self.progress, self.findings)

    def _structure(
        self, config: dict, shapes: dict[str, tuple[int, ...]]
    ) -> tuple[Format | None, dict[str, Scheme | None]]:
        """The format and the schemes that config.json states, after the tensors were compared against them."""
        family = family_of(config)
        blocks = range(family.num_blocks)
        names = [n for i in blocks for n in (*family.linears(i), *family.routers(i))] + [family.lm_head]
        kept_as, schemes = self._parse(config, names)
        if kept_as is not None:
            self._compare_choices(schemes)
            self._compare(self._wanted(kept_as, family, schemes, shapes))
        return kept_as, schemes

    def _choices(self, manifest: dict) -> dict[str, Any]:
        linears = manifest.get("linears")
        if not isinstance(linears, dict) or not all(isinstance(entry, dict) for entry in linears.values()):
            self.findings.add("manifest", MANIFEST, f"{MANIFEST} does not say how each linear was quantized")
            return {}
        return linears

    def _model_shapes(self, config: dict) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters of the model that config.json describes, as transformers names them."""
        try:
            blocks, held = family_of(config).num_blocks, len(self.inventory.tensors)
            if self.inventory.whole and blocks > held:
                raise HalfbyteError(f"{blocks} blocks, and the files hold {held} tensors")
            return model_shapes(config)
        except Exception as error:  # transformers may raise anything for a config that makes no sense
            self.findings.add("config", "config.json", f"config.json describes no model: {error}")
            return {}

    def _parse(self, config: dict, names: list[str]) -> tuple[Format | None, dict[str, Scheme | None]]:
        stated = config.get("quantization_config")
        try:
            if not isinstance(stated, dict):
                raise HalfbyteError("there is no quantization_config: vLLM would take the weights for BF16")
            kept_as = detect_format(stated)
            schemes = kept_as.parse(stated, names)
            extra = kept_as.extra_files(stated)
        except _BROKEN as error:
            self.findings.add("config", "config.json", f"quantization_config: {error}")
            return None, {}
        for file, contents in extra.items():
            found = read_object(self.directory / file, "config", self.findings)
            if found and found != contents:
                self.findings.add("config", file, f"{file} does not say what config.json says: write it again")
        return kept_as, schemes

    def _compare_choices(self, schemes: dict[str, Scheme | None]) -> None:
        for name, entry in self.chosen.items():
            was, now = entry.get("scheme"), schemes.get(name)
            if not _same(was, now):
                told = "no quantization" if now is None else f"{now.grid} in groups of {now.group_size}"
                self.findings.add("config", name, f"config.json says {told}, the quantizer chose {was or 'none'}")
        for name, scheme in schemes.items():
            entry = self.chosen.get(name, {"scheme": "unknown"})
            if scheme is not None and self.chosen and entry.get("scheme") and "fingerprint" not in entry:
                self.findings.add("manifest", name, f"{MANIFEST} does not say what the quantizer chose for {name}")

    def _wanted(
        self,
        kept_as: Format,
        family: Family,
        schemes: dict[str, Scheme | None],
        shapes: dict[str, tuple[int, ...]],
    ) -> dict[str, _Wanted]:
        head = f"{family.lm_head}.weight"
        wanted = {n: _Wanted(_FLOATS, s, optional=n == head and family.tied) for n, s in shapes.items()}
        for name, scheme in schemes.items():
            if scheme is None:
                continue
            if name == family.lm_head and family.tied:
                self.findings.add("config", name, "lm_head is tied to the embeddings, so vLLM cannot quantize it")
                continue
            out, width = wanted.pop(f"{name}.weight").shape
            if width % columns(scheme.group_size, width):
                self.findings.add("config", name, f"groups of {scheme.group_size} do not divide its {width} inputs")
                continue
            try:
                expected = kept_as.expected(name, out, width, scheme)
            except HalfbyteError as error:
                self.findings.add("config", name, str(error))
                continue
            wanted |= {n: _Wanted((DTYPES[dtype],), shape) for n, (dtype, shape) in expected.items()}
        return wanted

    def _compare(self, wanted: dict[str, _Wanted]) -> None:
        for name, want in wanted.items():
            info = self.inventory.tensors.get(name)
            if info is None:
                known = name in self.inventory.lost or not (self.inventory.whole or self.inventory.lost)
                if not want.optional and not known:
                    self.findings.add("tensor-missing", name, f"vLLM needs {name}, and no file has it")
                continue
            if info.dtype not in want.dtypes or info.shape != want.shape:
                self.malformed.add(name.rpartition(".")[0])
            if info.dtype not in want.dtypes:
                self.findings.add("dtype", name, f"{info.dtype} instead of {' or '.join(want.dtypes)}")
            if info.shape != want.shape:
                self.findings.add("shape", name, f"{list(info.shape)} instead of {list(want.shape)}")
        for name in self.inventory.tensors.keys() - wanted.keys():
            self.findings.add("tensor-unexpected", name, "vLLM does not look for this tensor")


def model_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the (unquantized) model of a config.json, by the checkpoint's names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in config.items() if k not in ("quantization_config", "model_type", "auto_map")}
    described = AutoConfig.for_model(config["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described)
    unfuse(model, family_of(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _same(was: Any, now: Scheme | None) -> bool:
    """Whether the manifest's scheme is what the config says (NVFP4 stores blocks of 16 whatever shares them)."""
    if not isinstance(was, dict) or now is None:
        return was is None and now is None
    size = was.get("group_size")
    alike = now.grid == "nvfp4" or now.group_size in (-1, size)
    return was.get("grid") == now.grid and alike
