"""Validation is the same from every store: the bytes pass once, in the store's own pieces, into blobs by digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.engines import make_checkpoint

from weighbridge.storage.blobs import Blobs
from weighbridge.storage.local_cache import BlobCache
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import Store
from weighbridge.workers.bindings import Programs, TemplateInfo
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.validate import ValidateTask, validate


def weigh(store: Store, key: str, made: Any, cache: Path) -> Outcome:
    blobs = Blobs(store, "artifacts")
    blobs.put_bytes(made.pt2)
    template = TemplateInfo("digits", made.digest, made.fingerprint, made.parameters, made.inputs, made.outputs)
    task = ValidateTask("digits", 1, key, (pin(store.head(key)),), programs=Programs((template,)))
    local = BlobCache(cache)
    return validate(task, source=store, blobs=blobs, cache=lambda digest: local.ensure_from(blobs, digest))


def test_a_checkpoint_is_weighed_and_kept(any_store: Store, digits_template: Any, tmp_path: Path) -> None:
    """Passed; the blob has the dropped bytes, and staging is empty."""
    data = make_checkpoint(tmp_path / "a.safetensors").read_bytes()
    any_store.put("digits/a.safetensors", data)
    outcome = weigh(any_store, "digits/a.safetensors", digits_template, tmp_path / "cache")
    assert outcome.verdict == "passed"
    (file,) = outcome.facts["files"]
    assert Blobs(any_store, "artifacts").get(file["digest"]) == data
    assert not list(any_store.list("artifacts/staging/"))


@pytest.mark.parametrize("value", [np.nan, 1.0])
def test_every_byte_of_a_large_file_is_looked_at(
    any_store: Store, digits_template: Any, tmp_path: Path, value: float
) -> None:
    """12 MB pass in several parts; a NaN in the very last element of the file is found."""
    big = np.ones(3_000_001, np.float32)
    big[-1] = value
    path = make_checkpoint(tmp_path / "a.safetensors", zzz=big)
    any_store.put("digits/a.safetensors", path)
    outcome = weigh(any_store, "digits/a.safetensors", digits_template, tmp_path / "cache")
    if np.isnan(value):
        assert outcome.reason == "zzz has 1 non-finite value of 3,000,001 (NaN or Inf)"
    else:
        assert (outcome.verdict, outcome.facts["tensors"]["constant"]) == ("needs_binding", ["zzz"])
