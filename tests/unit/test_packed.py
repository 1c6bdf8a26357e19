"""Packed files: what they decode to, and which of them are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weighbridge.engines import packed
from weighbridge.engines.errors import LoadError

Tensors = dict[str, torch.Tensor]


def said(method: str = "int8-rows", group: int = 32, **tensors: list[Any]) -> dict[str, Any]:
    return {"format": 1, "method": method, "group": group, "tensors": tensors}


def put(folder: Path, tensors: Tensors, metadata: dict[str, Any] | str | None) -> dict[str, Path]:
    """A packed file, written by hand."""
    path = folder / "model.safetensors"
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(tensors, path, {"format": "pt"} if metadata is None else {packed.METADATA: text})
    return {"model.safetensors": path}


def int8() -> Tensors:
    codes = torch.tensor([[127, -127, 0], [64, 1, -1]], dtype=torch.int8)
    return {"w": codes, "w.scale": torch.tensor([0.5, 2.0]), "bias": torch.ones(3)}


def test_int8_rows_are_codes_times_their_rows_scale(tmp_path: Path) -> None:
    """A packed weight is exactly code · scale, in the original's dtype; what was kept is untouched."""
    found = packed.unpack(put(tmp_path, int8(), said(w=["BF16", [2, 3]])))
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [[63.5, -63.5, 0.0], [128.0, 2.0, -2.0]]
    assert found["bias"].tolist() == [1.0, 1.0, 1.0]
    assert found.keys() == {"w", "bias"}


def test_groups_hold_their_codes_from_the_lowest_bits_on(tmp_path: Path) -> None:
    """int4: two codes a byte, plus 8; int2: four a byte, plus 2. The first weight is in the lowest bits."""
    scale = torch.tensor([[1.0, 0.5]], dtype=torch.bfloat16)
    four = {"w": torch.tensor([[0x1F, 0x98]], dtype=torch.uint8), "w.scale": scale}
    found = packed.unpack(put(tmp_path, four, said("int4-groups", 2, w=["F32", [1, 4]])))
    assert found["w"].tolist() == [[7.0, -7.0, 0.0, 0.5]]
    two = {"w": torch.tensor([[0b11_10_01_10, 0b10_11_11_01]], dtype=torch.uint8), "w.scale": scale}
    found = packed.unpack(put(tmp_path, two, said("int2-groups", 4, w=["F16", [1, 8]])))
    assert found["w"].tolist() == [[0.0, -1.0, 0.0, 1.0, -0.5, 0.5, 0.5, 0.0]]


def test_fp8_codes_are_their_own_values(tmp_path: Path) -> None:
    codes = torch.tensor([[448.0, -0.25], [2.0**-9, 0.0]]).to(torch.float8_e4m3fn)
    files = put(tmp_path, {"w": codes, "w.scale": torch.tensor([2.0, 1.0])}, said("fp8-tensors", w=["F64", [2, 2]]))
    assert packed.unpack(files)["w"].tolist() == [[896.0, -0.5], [2.0**-9, 0.0]]


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((8, 768), (8,)),
        ((32, 16, 3, 3), (32,)),
        ((4, 512, 128), (4, 512)),
        ((8, 1, 3), (8,)),
        ((2, 9, 7, 70), (2, 9, 7)),
    ],
)
def test_a_linear_layer_has_a_scale_for_each_output_a_convolution_for_each_channel(
    shape: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    """Stacked experts have one for each output of each expert; none is spent on a kernel's three columns."""
    place = packed.layout(packed.SCHEMES["int8-rows"], 32, "F32", shape)
    assert place.scales == scales
    assert place.codes == shape


Change = Callable[[Tensors, dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t, m: t.pop("w.scale"), "w.scale is missing"),
        (lambda t, m: t.update({"w.scale": torch.tensor([0.5])}), r"w.scale must be F32 \[2\]"),
        (lambda t, m: t.update({"w.scale": torch.tensor([0.5, 0.5]).double()}), "w.scale must be F32"),
        (lambda t, m: t.update({"w": t["w"].float()}), r"w must be I8 \[2, 3\]"),
        (lambda t, m: t.update({"w.scale": torch.tensor([0.5, float("nan")])}), "w has a scale that is not a positive"),
        (lambda t, m: t.update({"w.scale": torch.tensor([0.5, -1.0])}), "w has a scale that is not a positive"),
        (lambda t, m: t.update({"w.scale": torch.tensor([3e38, 1.0])}), "w decodes to NaN or Inf"),
        (lambda t, m: m["tensors"].update(w=["BF16", [3, 2]]), r"w must be I8 \[3, 2\]"),
        (lambda t, m: m["tensors"].update(w=["I64", [2, 3]]), "w cannot be int8-rows: I64"),
        (lambda t, m: m["tensors"].update(w=["BF16", [2, -3]]), r"w must be described as \[dtype, shape\]"),
        (lambda t, m: m["tensors"].update(w="BF16"), r"w must be described as \[dtype, shape\]"),
        (lambda t, m: m["tensors"].update(bias=["F32", [3]]), "bias cannot be int8-rows: fewer than two"),
        (lambda t, m: m["tensors"].update({"w.scale": ["F32", [2, 1]]}), "both a compressed tensor and a scale"),
        (lambda t, m: m.update(method="int3-rows"), "'int3-rows' is no packed method"),
        (lambda t, m: m.update(format=2), "must have format 1"),
        (lambda t, m: m.update(extra=1), "nothing else"),
        (lambda t, m: m.update(group=0), "group must be 2 to 65536"),
        (lambda t, m: m.update(tensors=[]), "tensors must be an object"),
    ],
)
def test_a_packed_file_that_does_not_add_up_is_refused(tmp_path: Path, change: Change, rule: str) -> None:
    """Every host refuses it, naming the file, the tensor and the rule, instead of serving what it guessed."""
    tensors, metadata = int8(), said(w=["BF16", [2, 3]])
    change(tensors, metadata)
    with pytest.raises(LoadError, match=f"model.safetensors.*{rule}"):
        packed.unpack(put(tmp_path, tensors, metadata))


def test_a_file_without_the_packed_header_is_refused(tmp_path: Path) -> None:
    """Codes alone must never be served as if they were weights."""
    with pytest.raises(LoadError, match="is not packed"):
        packed.unpack(put(tmp_path, int8(), None))
    with pytest.raises(LoadError, match=r"weighbridge\.packed is .* there twice"):
        packed.unpack(put(tmp_path, int8(), '{"format": 1, "format": 1}'))


def test_a_file_that_lost_its_end_and_a_tensor_in_two_files_are_refused(tmp_path: Path) -> None:
    files = put(tmp_path, int8(), said(w=["BF16", [2, 3]]))
    with pytest.raises(LoadError, match=r"b\.safetensors: (w|bias) is also in another file"):
        packed.unpack(files | {"b.safetensors": files["model.safetensors"], "config.json": tmp_path})
    path = files["model.safetensors"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoadError, match=r"model.safetensors.* bytes"):
        packed.unpack(files)


def test_an_fp8_nan_is_refused(tmp_path: Path) -> None:
    codes = torch.tensor([[float("nan"), 1.0]]).to(torch.float8_e4m3fn)
    files = put(tmp_path, {"w": codes, "w.scale": torch.ones(1)}, said("fp8-tensors", w=["F32", [1, 2]]))
    with pytest.raises(LoadError, match="w decodes to NaN or Inf"):
        packed.unpack(files)
