"""The second act's two models: their recipes, their variants, and what must become of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from weighbridge.demo import digits, drops

_RECIPE = """\
# What this model's owner wishes; docs/recipe.md and docs/variants.md have every field.
program:
  template: {template}
gates:
  - {{metric: accuracy, min: 0.9, max_drop: 0.05}}
variants:
{variants}
quality:
  keep: 0.98           # of the original's accuracy, with 95% confidence
objective:
  best: latency
rollout:
  automatic: true
  waves: [1, "100%"]
  bake: 0.5
"""


@dataclass(frozen=True, eq=False)
class Trial:
    """A model and a checkpoint of it. `variants`: the recipe's line of each, and its right end."""

    model: str
    template: str
    checkpoint: str
    variants: Mapping[str, tuple[str, str]]

    @property
    def path(self) -> str:
        return f"{self.model}/{self.checkpoint}.safetensors"

    @property
    def recipe(self) -> str:
        lines = "\n".join(f"  - {line}" for line, _ in self.variants.values())
        return _RECIPE.format(template=self.template, variants=lines)

    def expected(self, variant: str) -> str:
        return self.variants[variant][1]


def _good(*methods: str) -> dict[str, tuple[str, str]]:
    return {method: (method, "ready") for method in methods}


MLP = Trial(
    drops.MODEL,
    digits.TEMPLATE,
    "with-variants",
    _good("bf16", "onnx", "onnx-int8-dynamic") | {"int2-groups": ("int2-groups", "rejected")},
)
CNN = Trial(
    "digits-cnn",
    digits.CNN_TEMPLATE,
    "first",
    _good("int8-rows", "onnx", "onnx-int8-static")
    | {"pruned-95": ("{method: prune-magnitude, name: pruned-95, sparsity: 0.95}", "rejected")},
)
ALL = (MLP, CNN)


def trained(trial: Trial) -> bytes:
    """Train: the bytes of the trial's checkpoint."""
    if trial is MLP:
        module: Any = digits.train(400, seed=8)
    else:
        torch.manual_seed(7)
        module = digits.train(250, seed=7, module=digits.build_cnn(), rate=0.003)
    return save(module.state_dict(), metadata={"format": "pt"})
