"""The eight drops: what each is, what must become of it, and its bytes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from weighbridge.demo import digits

MODEL = "digits"
RECIPE = f"""\
# What this model's owner wishes; docs/recipe.md has every field.
program:
  template: {digits.TEMPLATE}
gates:
  - metric: accuracy
    min: 0.9
    max_drop: 0.05
rollout:
  automatic: true
  waves: [1, "100%"]
  bake: 0.5
"""

Write = Callable[[str, bytes], None]
"""Puts an object at a key: in place in a folder, as a careless trainer does; a PUT on S3."""


@dataclass(frozen=True)
class Drop:
    """One row of the table. `path` is where its version lies in the bucket; `expected` its right end."""

    name: str
    path: str
    expected: str
    what: str


def _single(name: str, expected: str, what: str, file: str = "") -> Drop:
    return Drop(name, f"{MODEL}/{file or name}.safetensors", expected, what)


GOOD = _single("good", "ready", "a first good checkpoint")
BETTER = _single("better", "ready", "trained for longer")
SHARDED = Drop("ddp-sharded", f"{MODEL}/ddp-sharded/", "ready", "two shards from DistributedDataParallel")
WORSE = _single("worse", "rejected", "hardly trained: fails its gate")
NAN = _single("nan", "rejected", "one weight is NaN")
TRUNCATED = _single("truncated", "ready", "cut off in mid-upload, completed later")
OVERWRITTEN = _single("overwritten", "superseded", "overwritten while it is validated")
AGAIN = _single("overwritten-again", "ready", "what it was overwritten with", "overwritten")
PICKLE = _single("pickle", "quarantined", "a pickle named .safetensors")

ALL = (GOOD, BETTER, SHARDED, WORSE, NAN, TRUNCATED, OVERWRITTEN, AGAIN, PICKLE)
"""In the order of the table; OVERWRITTEN and AGAIN are two contents of one object, so eight are dropped."""


def trained() -> Mapping[Drop, bytes]:
    """Train and spoil: the bytes of every single-object checkpoint but the overwritten one's first content."""
    good = digits.train(80, seed=1).state_dict()
    better = digits.train(300, seed=2).state_dict()
    worse = digits.train(8, seed=1).state_dict()
    other = digits.train(250, seed=4).state_dict()
    again = digits.train(250, seed=5).state_dict()
    spoilt = {name: tensor.clone() for name, tensor in better.items()}
    spoilt["0.weight"][3, 5] = float("nan")
    states = {GOOD: good, BETTER: better, WORSE: worse, NAN: spoilt, TRUNCATED: other, AGAIN: again}
    return {drop: save(state, metadata={"format": "pt"}) for drop, state in states.items()}


def heavy(megabytes: int) -> bytes:
    """A checkpoint with ballast, so that reading it takes a moment: time enough to overwrite it."""
    state = dict(digits.train(80, seed=6).state_dict())
    state["ballast"] = torch.zeros(megabytes << 18)
    return save(state, metadata={"format": "pt"})


def hostile(sentinel: Path) -> bytes:
    """A pickle that would make `sentinel`, did anybody load it."""
    return pickle.dumps(_Touch(str(sentinel)))


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def write_folder(write: Write, folder: Path, path: str) -> None:
    """Put a folder's files below `path`, in the worst order: the index comes before the shards that it names."""
    for file in sorted(folder.iterdir(), key=lambda file: (file.suffix != ".json", file.name)):
        write(path + file.name, file.read_bytes())
