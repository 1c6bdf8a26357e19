"""The artifact manifest, version 1: what a variant is made of, content-addressed.

A manifest is canonical JSON (sorted keys, no spaces, UTF-8) and itself a blob: its BLAKE3 digest names the artifact.
The bytes of the weights are those that were dropped, never rewritten to rename tensors: `binding` maps names instead.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

FORMAT: Literal["weighbridge.artifact/1"] = "weighbridge.artifact/1"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Sparse(_Frozen):
    """Written without what is as by default: manifests and rows from before a field existed keep their digests."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in write(self).items()
            if fields[name].is_required() or getattr(self, name) != fields[name].default
        }


class Term(_Sparse):
    """`times` the length of `axis` of the input `input`."""

    input: str
    axis: int
    times: int = 1


class Length(_Sparse):
    """What a free length may be: `minimum`, and on from there in steps of `step`, up to `maximum` (None: no end known).

    With `of`, it is no choice: the sum of these terms, plus `plus`.
    """

    axis: int
    minimum: int = 1
    maximum: int | None = None
    step: int = 1
    of: tuple[Term, ...] = ()
    plus: int = 0


class Values(_Sparse):
    """The integers that an input may hold: from `minimum` to `maximum`, both included, and those in `also`.

    Several bounds are one for each place along the fixed axes, flattened (a column of categories each); None: no bound.
    `below`: every value is less than this length (positions); negative ones count from its end where `minimum` is None.
    """

    minimum: tuple[int, ...] | None = None
    maximum: tuple[int, ...] | None = None
    also: tuple[int, ...] = ()
    below: Term | None = None


class TensorSpec(_Sparse):
    """An input or output. `datatype` is the Open Inference Protocol's; a -1 in `shape` is free (`[-1, 64]`).

    `lengths` and `values` are the rest of an input's contract, as far as it is known; axis 0, where free, is the batch.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    lengths: tuple[Length, ...] = ()
    values: Values | None = None


class ArtifactFile(_Frozen):
    """One file. `path` is the checkpoint's own relative path; the bytes are the blob `digest` (BLAKE3, hex)."""

    path: str
    size: int
    digest: str


class Program(_Frozen):
    """What runs the weights: a template (`digest` of its `.pt2`), an allow-listed `module:factory`, or ONNX.

    An ONNX program is the one `.onnx` file of the artifact, weights included, which a worker of ours exported: `digest`
    is that file's, and the binding is empty. A template is an operator's, or one that a worker of ours made of it
    (structured pruning changes shapes).
    """

    kind: Literal["template", "factory", "onnx"]
    name: str
    digest: str | None = None


class Encoding(_Frozen):
    """How the files stand for the program's parameters, where they do not simply hold them.

    `torchao`: the flattened tensor subclasses of torchao's safetensors support; a template's `nn.Linear` are rebuilt
    first (engines.linears). `packed`: int8 rows, int4 groups or fp8 of engines.packed, unpacked into the program's
    dtype while loading. `half`: linear layers multiply in the 16 bits that their weights have, all else is the
    program's own. `semi_structured`: such weights, 2:4-sparse, of which a CUDA device makes its sparse form.
    """

    kind: Literal["torchao", "packed", "semi_structured", "half"]
    details: dict[str, str] = Field(default_factory=dict)


class Golden(_Frozen):
    """The reference golden: the blob of a safetensors file with `input.<name>` and `output.<name>` tensors.

    Outputs match when |seen − recorded| ≤ atol + rtol · |recorded| + spread · scale element-wise, where `scale` is how
    far the recorded output varies (engines.spread); what was named before there was a spread has 0.
    """

    digest: str
    size: int
    rtol: float
    atol: float
    spread: float = 0.0

    @property
    def tolerance(self) -> tuple[float, float, float]:
        """What `golden.check` takes."""
        return self.rtol, self.atol, self.spread


class Manifest(_Frozen):
    """Format, files, program, binding {tensor in the files → parameter of the program}, inputs, outputs, golden."""

    format: Literal["weighbridge.artifact/1"] = FORMAT
    variant: str
    files: tuple[ArtifactFile, ...]
    program: Program
    binding: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    golden: Golden
    engine: dict[str, str] = Field(default_factory=dict)
    """What the engine must offer, e.g. {"name": "torch", "minimum": "2.8"}; `name` is torch or onnxruntime."""
    encoding: Encoding | None = None
    ties: dict[str, str] = Field(default_factory=dict)
    """{parameter without a tensor → the one whose tensor it shares}: a template without weights cannot tell."""

    def canonical(self) -> bytes:
        said = self.model_dump(mode="json")
        if self.encoding is None:
            del said["encoding"]  # what was named before there were encodings keeps its digest
        if not self.golden.spread:
            del said["golden"]["spread"]
        if not self.ties:
            del said["ties"]
        return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def digest(self) -> str:
        return blake3(self.canonical()).hexdigest()

    def blobs(self) -> dict[str, int]:
        """Every blob that a host needs besides the manifest itself: {digest: size in bytes, -1 where not recorded}."""
        need = {file.digest: file.size for file in self.files}
        need[self.golden.digest] = self.golden.size
        if self.program.digest is not None:
            need[self.program.digest] = -1
        return need
