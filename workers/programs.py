"""Which program an artifact may load: what SQL says, whatever a manifest names."""

from __future__ import annotations

from weighbridge.engines.blobs import read_manifest
from weighbridge.engines.errors import LoadError
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import BlobPath
from weighbridge.registry import artifacts, templates
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import NotFound

_ORIGINAL = "original"


class UnknownProgram(LoadError):
    """The manifest names a program that the registry did not record for this artifact."""


def prove(db: Database, cache: BlobPath, *digests: str) -> None:
    """Ask for each of these artifacts whether SQL knows its program. Raises LoadError, and what `cache` raises."""
    manifests = {digest: read_manifest(cache, digest) for digest in digests}
    with db.read() as tx:
        for digest, manifest in manifests.items():
            check(tx, digest, manifest)


def check(tx: Session, artifact: str, manifest: Manifest) -> None:
    """Raise UnknownProgram unless the program is the registered template, or one noted when the variant was made.

    A factory has no bytes: whoever makes it asks the operator's policy for its name.
    """
    program = manifest.program
    if program.kind == "factory":
        return
    if program.digest is None or program.digest not in artifacts.blobs(tx, artifact):
        raise UnknownProgram(f"artifact {artifact}: its program {program.digest} was not recorded with it")
    if program.kind == "template" and manifest.variant == _ORIGINAL and program.digest != _registered(tx, program.name):
        raise UnknownProgram(f"artifact {artifact}: its program is not the registered template {program.name}")


def _registered(tx: Session, name: str) -> str | None:
    try:
        return templates.get(tx, name).digest
    except NotFound:
        return None
