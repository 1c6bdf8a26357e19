"""What a template's registration holds, field by field: what workers could not parse later is refused when it is sent.

The registry knows no engine; a test compares these fields and names with `engines.binding` and `engines.manifest`. Rows
keep what was sent, without defaults, as rows from before a field existed do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from weighbridge import limits
from weighbridge.registry.schemas import Sent
from weighbridge.storage.safetensors_header import BITS, MAX_RANK, MAX_TENSORS

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64",
    "BYTES",
)  # fmt: skip
"""Of inputs and outputs, as the Open Inference Protocol names them."""


def _dtype(name: str) -> str:
    if name not in BITS:
        raise ValueError(f"no dtype of safetensors; known are {', '.join(sorted(BITS))}")
    return name


def _datatype(name: str) -> str:
    if name not in DATATYPES:
        raise ValueError(f"no datatype of the protocol; known are {', '.join(DATATYPES)}")
    return name


_Tensor = Annotated[limits.Text, Field(min_length=1, max_length=limits.TENSOR)]
_Size = Annotated[int, Field(strict=True, ge=0, le=limits.BYTES)]
_Free = Annotated[int, Field(strict=True, ge=-1, le=limits.BYTES)]
_Axis = Annotated[int, Field(strict=True, ge=0, lt=MAX_RANK)]
_Whole = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)]


class _Strict(Sent):
    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def _as_sent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if name in self.model_fields_set}


class TemplateParameter(_Strict):
    """A parameter or persistent buffer of the program; `tied` names the one whose storage it shares."""

    shape: Annotated[list[_Size], Field(max_length=MAX_RANK)]
    dtype: Annotated[str, AfterValidator(_dtype)]
    tied: _Tensor | None = None
    nonfinite: limits.Id | None = None
    unread: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _fits(self) -> TemplateParameter:
        if math.prod(self.shape) * BITS[self.dtype] > 8 * limits.BYTES:
            raise ValueError("a shape of more than 2^63 bytes")
        return self


class TemplateTerm(_Strict):
    """`times` the length of an axis of an input."""

    input: _Tensor
    axis: _Axis
    times: _Whole = 1


class TemplateLength(_Strict):
    """What a free length may be."""

    axis: _Axis
    minimum: _Size = 1
    maximum: _Size | None = None
    step: Annotated[int, Field(strict=True, ge=1, le=limits.BYTES)] = 1
    of: list[TemplateTerm] = Field(default_factory=list, max_length=limits.ENTRIES)
    plus: _Whole = 0

    @model_validator(mode="after")
    def _is_range(self) -> TemplateLength:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"a maximum of {self.maximum}, less than the minimum of {self.minimum}")
        return self


class TemplateValues(_Strict):
    """The integers that an input may hold."""

    minimum: Annotated[list[_Whole], Field(max_length=MAX_TENSORS)] | None = None
    maximum: Annotated[list[_Whole], Field(max_length=MAX_TENSORS)] | None = None
    also: list[_Whole] = Field(default_factory=list, max_length=limits.ENTRIES)
    below: TemplateTerm | None = None


class TemplateSpec(_Strict):
    """An input or output; -1 is a free length."""

    name: _Tensor
    datatype: Annotated[str, AfterValidator(_datatype)]
    shape: Annotated[list[_Free], Field(max_length=MAX_RANK)]
    lengths: list[TemplateLength] = Field(default_factory=list, max_length=MAX_RANK)
    values: TemplateValues | None = None

    @property
    def terms(self) -> list[TemplateTerm]:
        below = self.values.below if self.values else None
        return [term for length in self.lengths for term in length.of] + ([below] if below else [])


class NewTemplate(Sent):
    """A template whose `.pt2` is uploaded already: its name, the digest of the file, and what the exporter recorded."""

    name: limits.Name = Field(min_length=1)
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    fingerprint: limits.Id
    parameters: dict[_Tensor, TemplateParameter] = Field(max_length=MAX_TENSORS)
    inputs: list[TemplateSpec] = Field(max_length=limits.ENTRIES)
    outputs: list[TemplateSpec] = Field(max_length=limits.ENTRIES)

    @model_validator(mode="after")
    def _refers_to_itself(self) -> NewTemplate:
        """Every name that one part says of another is there."""
        for name, one in self.parameters.items():
            if one.tied is not None and one.tied not in self.parameters:
                raise ValueError(f"parameter {limits.quoted(name)} is tied to {limits.quoted(one.tied)}, which is none")
        for specs in (self.inputs, self.outputs):
            _check_specs(specs, {spec.name: len(spec.shape) for spec in self.inputs})
        return self


def _check_specs(specs: Sequence[TemplateSpec], ranks: dict[str, int]) -> None:
    names = set[str]()
    for spec in specs:
        if spec.name in names:
            raise ValueError(f"{limits.quoted(spec.name)} is there twice")
        names.add(spec.name)
        if wrong := [one.axis for one in spec.lengths if one.axis >= len(spec.shape)]:
            raise ValueError(f"{limits.quoted(spec.name)} has lengths of axis {wrong[0]}, and no such axis")
        for term in spec.terms:
            if term.axis >= ranks.get(term.input, 0):
                raise ValueError(
                    f"{limits.quoted(spec.name)} goes by axis {term.axis} of {limits.quoted(term.input)}: no such input"
                )
