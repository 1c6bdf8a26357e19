"""A writer of the folder where artifacts lie (the watched one, at old sites) runs no code in a worker."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.engines import make_checkpoint
from safetensors.numpy import save

from weighbridge.engines.manifest import Manifest
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import StorageError
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.pins import pin
from weighbridge.storage.streaming import digest_bytes
from weighbridge.workers.bindings import Programs, TemplateInfo
from weighbridge.workers.cache import WorkerCache
from weighbridge.workers.evaluate import EvaluateTask, evaluate
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.validate import ValidateTask, validate


class _Touch:
    """A pickle of it makes a file, did anybody load it."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> Any:
        return Path.touch, (self._sentinel,)


def _evil(pt2: bytes, sentinel: Path) -> bytes:
    """The template with a payload in place of its example inputs, which torch.export.load unpickles."""
    payload, made = io.BytesIO(), io.BytesIO()
    torch.save(_Touch(sentinel), payload)
    with zipfile.ZipFile(io.BytesIO(pt2)) as old, zipfile.ZipFile(made, "w") as new:
        (inputs,) = (name for name in old.namelist() if "sample_inputs" in name)
        for name in old.namelist():
            new.writestr(name, payload.getvalue() if name == inputs else old.read(name))
    return made.getvalue()


class Site:
    """A watched folder with the artifacts in it, a checkpoint that was validated, and a worker's cache."""

    def __init__(self, folder: Path, template: Any) -> None:
        self.drops, self.sentinel = folder / "drops", folder / "sentinel"
        store = FolderStore(self.drops, create=True)
        self.blobs = Blobs(store, ".weighbridge")
        self.blobs.put_bytes(template.pt2)
        self.evil = _evil(template.pt2, self.sentinel)
        self.cache = WorkerCache(self.blobs, folder / "cache", 1 << 30)
        (self.drops / "digits").mkdir()
        make_checkpoint(self.drops / "digits" / "a.safetensors")
        files = (pin(store.head("digits/a.safetensors")),)
        info = TemplateInfo(
            "digits", template.digest, template.fingerprint, template.parameters, template.inputs, template.outputs
        )
        task = ValidateTask("digits", 1, "digits/a.safetensors", files, programs=Programs((info,)))
        outcome = validate(task, source=store, blobs=self.blobs, cache=WorkerCache(self.blobs, folder / "one", 1).path)
        assert outcome.verdict == "passed", outcome.reason
        self.artifact: str = outcome.facts["artifact_digest"]
        rows = {"pixels": np.zeros((4, 64), np.float32), "labels": np.zeros(4, np.int64)}
        self.dataset = self.blobs.put_bytes(save(rows)).digest

    def swap(self) -> Manifest:
        """Put `.weighbridge` aside and back, with a manifest under the artifact's name that names the evil program."""
        aside = self.drops / "aside"
        (self.drops / ".weighbridge").rename(aside)
        shutil.copytree(aside, self.drops / ".weighbridge")
        good = Manifest.model_validate_json(self.blobs.get(self.artifact))
        digest = digest_bytes(self.evil)
        bad = good.model_copy(update={"program": good.program.model_copy(update={"digest": digest})})
        self.place(digest).parent.mkdir(exist_ok=True)
        self.place(digest).write_bytes(self.evil)
        self.place(self.artifact).write_bytes(bad.canonical())
        return bad

    def place(self, digest: str) -> Path:
        return self.drops / self.blobs.key(digest)

    def evaluate(self) -> Outcome:
        return evaluate(EvaluateTask(self.artifact, self.dataset), cache=self.cache.path)


@pytest.fixture
def site(tmp_path: Path, digits_template: Any) -> Site:
    return Site(tmp_path, digits_template)


def test_the_payload_would_run(site: Site) -> None:
    """The exploit is real: whoever gives these bytes to torch.export.load has run them."""
    with pytest.raises(Exception):  # noqa: B017, PT011  (of no matter which kind: it was too late)
        torch.export.load(io.BytesIO(site.evil))
    assert site.sentinel.exists()


def test_a_manifest_put_in_place_of_another_runs_nothing(site: Site) -> None:
    """Its bytes are not those that SQL names: an error says so, and no program of it is loaded."""
    site.swap()
    with pytest.raises(StorageError, match=site.artifact):
        site.evaluate()
    assert not site.sentinel.exists()


def test_what_is_swapped_after_it_was_verified_changes_nothing(site: Site) -> None:
    """A worker acts on its own copies: between hashing and loading nobody else can reach them."""
    before = site.evaluate()
    site.swap()
    assert site.evaluate() == before
    assert not site.sentinel.exists()


def test_a_program_put_in_place_of_the_template_runs_nothing(site: Site) -> None:
    """Also under a manifest that is the right one."""
    program = Manifest.model_validate_json(site.blobs.get(site.artifact)).program.digest
    assert program is not None
    site.place(program).write_bytes(site.evil)
    with pytest.raises(StorageError, match=program):
        site.evaluate()
    assert not site.sentinel.exists()
