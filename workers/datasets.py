"""The evaluation and training sets that versions pin, copied into the blobs: what is judged by stays what it was."""

from __future__ import annotations

from typing import Any

from weighbridge.registry.models import Version
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import ObjectNotFound, PreconditionFailed
from weighbridge.storage.protocols import Ref, Store


class Changed(Exception):
    """The bucket holds another set than the version was recorded with; the message says what to do."""


class Datasets:
    """The sets of one bucket. What a process copied once it knows by its pin."""

    def __init__(self, source: Store, blobs: Blobs, reserve: int = 0) -> None:
        """`reserve`: bytes that stay free on the disk of the blobs."""
        self._source, self._blobs, self._reserve = source, blobs, reserve
        self._known: dict[Ref, str] = {}

    def evaluation(self, version: Version) -> str | None:
        """The digest of `eval.safetensors`; None without one. Raises Changed."""
        return self._digest(version.eval_pin, version.facts.get("dataset", {}), "eval.safetensors")

    def training(self, version: Version) -> str | None:
        """The digest of `train.safetensors`; None without one. Raises Changed."""
        return self._digest(version.train_pin, version.facts.get("training", {}), "train.safetensors")

    def keep(self, version: Version) -> dict[str, Any]:
        """Copy both while they are likely to be what was pinned; facts that say where. What changed, its user says."""
        facts: dict[str, Any] = {}
        for name, pin, digest_of in (
            ("dataset", version.eval_pin, self.evaluation),
            ("training", version.train_pin, self.training),
        ):
            try:
                if digest := digest_of(version):
                    facts[name] = {"pin": pin, "digest": digest}
            except Changed:
                continue
        return facts

    def _digest(self, pin: dict[str, Any] | None, kept: dict[str, Any], name: str) -> str | None:
        if pin is None:
            return None
        if kept.get("pin") == pin:
            return str(kept["digest"])
        ref = Ref(**pin)
        try:
            if ref not in self._known:
                self._blobs.require_space(ref.size, self._reserve)
                self._known[ref] = self._blobs.adopt(self._source, ref).digest
        except (PreconditionFailed, ObjectNotFound) as gone:
            raise Changed(
                f"{name} is not the one that this version was recorded with: "
                "`weighbridge rejudge` judges it by the present one"
            ) from gone
        return self._known[ref]
