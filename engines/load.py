"""Pick the engine for an artifact. Imports torch or onnxruntime only when it is called."""

from __future__ import annotations

from collections.abc import Sequence

from weighbridge.engines.errors import LoadError
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import BlobPath, Session


def load(
    manifest: Manifest,
    blobs: BlobPath,
    device: str = "cpu",
    factories: Sequence[str] = (),
    *,
    threads: int | None = None,
) -> Session:
    """Load an artifact on `device`; `factories` are patterns of allowed `package.module:factory`. Raises LoadError."""
    name = manifest.engine.get("name", "torch")
    if name == "onnxruntime":
        from weighbridge.engines.onnx_engine import OnnxEngine

        return OnnxEngine(threads=threads).load(manifest, blobs, device=device)
    if name != "torch":
        raise LoadError(f"the artifact needs the engine {name}; this release has torch and onnxruntime")
    from weighbridge.engines.torch_engine import TorchEngine

    return TorchEngine(factories, threads=threads).load(manifest, blobs, device=device)
