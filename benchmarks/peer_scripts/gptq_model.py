"""GPTQModel: GPTQ, symmetric, group-aware act-order.

Importing it needs torchvision (for vision models alone), whose wheels for a CPU's torch are in no package registry:
an empty module stands in.
"""

from __future__ import annotations

import sys
import types

from handed import handed
from transformers.utils import is_torchvision_available


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _without_torchvision() -> None:
    if is_torchvision_available():
        return
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = _Empty(name)
        module.__path__ = []
        sys.modules[name] = module


def main() -> None:
    _without_torchvision()
    from gptqmodel import GPTQModel, QuantizeConfig

    given = handed()
    config = QuantizeConfig(
        bits=4, group_size=given.options["group_size"], sym=True, desc_act=False, act_group_aware=True
    )
    model = GPTQModel.load(given.model, config, device="cpu")
    data = [{"input_ids": s, "attention_mask": [1] * len(s)} for s in given.sequences]
    model.quantize(data, batch_size=given.options.get("batch_size", 8))
    model.save(given.output)


if __name__ == "__main__":
    main()
