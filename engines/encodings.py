"""From the files of an artifact to its weights by tensor name, whatever encoding they are in. Fails closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from weighbridge.engines import linears
from weighbridge.engines.errors import LoadError
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import BlobPath

REBUILT = frozenset({"torchao", "semi_structured", "half"})
"""Encodings whose program gets its `nn.Linear` back before it is bound."""
HALF = frozenset({"semi_structured", "half"})
"""Those whose linear layers multiply in 16 bits where their weights have them."""
_DETAILS: Mapping[str, frozenset[str]] = {
    "torchao": frozenset({"torchao", "device"}),
    "packed": frozenset({"method", "format"}),
    "semi_structured": frozenset(),
    "half": frozenset(),
}
"""What an encoding's details may say. torchao: the minor version that wrote them; device: the only one it is for."""


def check_encoding(manifest: Manifest, device: str) -> None:
    """Raise LoadError for details that this program does not know, another torchao or device than the artifact's."""
    encoding = manifest.encoding
    if encoding is None:
        return
    known = _DETAILS[encoding.kind]
    if unknown := sorted(encoding.details.keys() - known):
        raise LoadError(f"the encoding {encoding.kind} says {unknown[0]}, which this version does not know: update it")
    if (only := encoding.details.get("device")) not in (None, device.partition(":")[0]):
        raise LoadError(f"the artifact's layout is for {only}; this device is {device}: build the variant for it")
    if encoding.kind == "torchao":
        from weighbridge.engines import torchao_format

        if "torchao" not in encoding.details:
            raise LoadError("the encoding torchao must name the torchao that wrote it")
        torchao_format.require(encoding.details["torchao"])


def decode(manifest: Manifest, blobs: BlobPath, device: str) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files by its name, on `device`; what two files hold is refused."""
    files = {file.path: blobs(file.digest) for file in manifest.files if file.path.endswith(".safetensors")}
    kind = manifest.encoding.kind if manifest.encoding is not None else ""
    if kind == "packed":
        from weighbridge.engines import packed

        return packed.unpack(files, device)
    read = _read_torchao if kind == "torchao" else _read_plain
    return _join(files, device, read)


def sparsify(module: nn.Module, device: str) -> None:
    """On CUDA, give every linear layer whose weight is 2:4-sparse its semi-structured form. Elsewhere: dense."""
    if not device.startswith("cuda"):
        return
    for layer in linears.linear_layers(module).values():
        if _is_2_4(layer.weight):
            sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
            layer.weight = nn.Parameter(sparse, requires_grad=False)


def _join(
    files: Mapping[str, Path], device: str, read: Callable[[Path, str], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path, local in files.items():
        try:
            part = read(local, device)
        except (SafetensorError, OSError) as exc:
            raise LoadError(f"{path}: {exc}") from exc
        twice = weights.keys() & part.keys()
        if twice:
            raise LoadError(f"{path}: {min(twice)} is also in another file of the checkpoint")
        weights |= part
    return weights


def _read_plain(path: Path, device: str) -> dict[str, torch.Tensor]:
    """Mapped from disk."""
    weights: dict[str, torch.Tensor] = load_file(path, device=device)
    return weights


def _read_torchao(path: Path, device: str) -> dict[str, torch.Tensor]:
    from weighbridge.engines import torchao_format

    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    return torchao_format.unflatten(load_file(path, device=device), metadata)


def _is_2_4(weight: torch.Tensor) -> bool:
    """Whether each four neighbours in a row have at most two that are not zero, and CUDA's kernels take the shape."""
    if weight.dtype not in (torch.float16, torch.bfloat16) or weight.shape[0] % 32 or weight.shape[1] % 64:
        return False
    return bool((weight.detach().reshape(-1, 4) != 0).sum(dim=1).le(2).all())
