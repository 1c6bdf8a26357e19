"""The one pass over weights: exact, whatever the pieces, whatever the dtype."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fixtures.checkpoints import raw, safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge.engines.stream import Inspector
from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.storage.safetensors_header import header_length, parse_header

CODES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}


def inspect(data: bytes, sizes: list[int]) -> list[TensorStats]:
    """Read the file through the Inspector in buffers of these sizes, over and over, and check the bytes."""
    header = parse_header(data[8 : 8 + header_length(data, "x", len(data))], "x")
    passed = b""
    with Inspector(io.BytesIO(data), header) as inspector:
        for buffer in _buffers(sizes):
            count = inspector.readinto(buffer)
            passed += buffer[:count]
            if not count:
                break
        assert passed == data
        return inspector.stats()


def _buffers(sizes: list[int]) -> Iterator[bytearray]:
    while True:
        for size in sizes:
            yield bytearray(size)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(sorted(CODES)),
    values=st.lists(
        st.floats(-1e4, 1e4, width=16) | st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=30
    ),
    sizes=st.lists(st.integers(1, 97), min_size=1, max_size=5),
    odd=st.integers(0, 3),
)
def test_pieces_change_nothing(dtype: str, values: list[float], sizes: list[int], odd: int) -> None:
    """Elements cut by buffers, tensors at odd offsets: the statistics are those of the whole array."""
    array: Any = np.array(values).astype(CODES[dtype])
    file = safetensors({"odd": ("U8", [odd], b"\1" * odd), "w": (dtype, [len(values)], array.tobytes())})
    seen = inspect(file, sizes)[1]
    wide = array.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    assert seen.nonfinite == len(wide) - len(finite)
    assert seen.zeros == sum(not any(array[i : i + 1].tobytes()) for i in range(len(array)))
    if len(finite):
        assert (seen.minimum, seen.maximum) == (finite.min(), finite.max())
        assert seen.rms == pytest.approx(np.sqrt((finite**2).mean()), rel=1e-3, abs=1e-6)
    else:
        assert seen.minimum is seen.maximum is seen.rms is None


@pytest.mark.parametrize(
    ("dtype", "data", "nonfinite"),
    [
        ("BF16", np.array([1, np.nan, 2], ml_dtypes.bfloat16).tobytes(), 1),
        ("F16", np.array([1, np.inf, -np.inf], np.float16).tobytes(), 2),
        ("F8_E4M3", b"\x38\x7f\xff", 2),
        ("F8_E5M2", b"\x38\x7c\x00", 1),
        ("I64", b"\xff" * 24, 0),
        ("U8", b"\xff" * 3, 0),
    ],
)
def test_non_finite_values_by_dtype(dtype: str, data: bytes, nonfinite: int) -> None:
    """Every floating dtype is checked; integers have nothing to check."""
    (seen,) = inspect(safetensors({"w": (dtype, [3], data)}), [64])
    assert seen.nonfinite == nonfinite


def test_constant_and_zero_tensors_show() -> None:
    """What training never writes is visible in the numbers."""
    ones, zeros = np.ones(1000, np.float32), np.zeros((2, 3), np.float16)
    file = safetensors({"ones": ("F32", [1000], ones.tobytes()), "zeros": ("F16", [2, 3], zeros.tobytes())})
    one, zero = inspect(file, [512])
    assert one.constant
    assert one.rms == pytest.approx(1)
    assert (zero.zeros, zero.constant, zero.shape) == (6, True, (2, 3))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_large_tensors_in_blocks(dtype: str) -> None:
    """More than one block, in a buffer that no element size divides."""
    array = np.random.default_rng(0).standard_normal(1_500_000).astype(CODES[dtype])
    (seen,) = inspect(safetensors({"w": (dtype, [len(array)], array.tobytes())}), [999_999])
    wide = array.astype(np.float64)
    assert (seen.minimum, seen.maximum, seen.nonfinite) == (wide.min(), wide.max(), 0)
    assert seen.rms == pytest.approx(np.sqrt((wide**2).mean()), rel=0.01 if dtype == "BF16" else 1e-4)


def test_squares_beyond_float32_do_not_become_infinite() -> None:
    """Large finite weights are large, not broken."""
    (seen,) = inspect(safetensors({"w": ("F32", [2], np.full(2, 1e30, np.float32).tobytes())}), [64])
    assert seen.nonfinite == 0
    assert seen.rms == pytest.approx(1e30, rel=1e-3)


def test_a_file_that_passed_in_part_has_no_statistics() -> None:
    """Half a look is no evidence."""
    data = safetensors()
    header = parse_header(data[8 : 8 + header_length(data, "x", len(data))], "x")
    with Inspector(io.BytesIO(data[:-1]), header) as inspector:
        while inspector.readinto(bytearray(50)):
            pass
        with pytest.raises(ValueError, match="not passed whole"):
            inspector.stats()


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 97), min_size=1, max_size=4),
)
def test_zeros_at_the_end_are_counted_to_the_byte(runs: list[tuple[int, int]], sizes: list[int]) -> None:
    """Whatever the pieces: the run that a tensor ends in, and no hole that is not there."""
    values = np.concatenate([np.r_[np.zeros(zeros), np.ones(ones)] for zeros, ones in runs]).astype(np.float32)
    (seen,) = inspect(safetensors({"w": ("F32", [len(values)], values.tobytes())}), sizes)
    nonzero = np.flatnonzero(values)
    assert seen.zero_tail == 4 * (len(values) - (nonzero[-1] + 1 if len(nonzero) else 0))
    gaps = np.diff(np.r_[-1, nonzero]) - 1
    assert seen.hole <= 4 * gaps.max(initial=0)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_hole_as_large_as_a_look_is_seen(dtype: str) -> None:
    """Pages that were never written, in the middle of a large tensor."""
    array = np.ones(3_000_000, CODES[dtype])
    array[700_000:2_000_000] = 0
    (seen,) = inspect(safetensors({"w": (dtype, [len(array)], array.tobytes())}), [999_999])
    assert (seen.hole, seen.zero_tail) == (1_300_000 * array.itemsize, 0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["F16", "BF16", "F32", "F64", "C64", "F8_E4M3", "I16", "U8", "BOOL"]),
            st.lists(st.sampled_from([0, 1, 60, 255]), max_size=12),
        ),
        min_size=1,
        max_size=60,
    ),
    size=st.integers(1, 3000),
)
def test_small_tensors_looked_at_together_are_what_each_is_alone(rows: list[tuple[str, list[int]]], size: int) -> None:
    """Dtypes in turn, empty ones between them, whatever the pieces: the same as one by one, byte by byte."""
    widths = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8, "I16": 2}
    tensors = {}
    for number, (dtype, codes) in enumerate(rows):
        data = np.repeat(np.array(codes, np.uint8), widths.get(dtype, 1)).tobytes()
        tensors[f"t{number}"] = (dtype, [len(codes)], data)
    file = safetensors(tensors)
    for together, alone in zip(inspect(file, [size]), inspect(file, [1]), strict=True):
        assert replace(together, rms=None, hole=0) == replace(alone, rms=None, hole=0)
        assert (together.rms or 0.0) == pytest.approx(alone.rms or 0.0, rel=1e-5)


def test_an_empty_tensor_that_the_header_names_last_is_looked_at_where_it_lies() -> None:
    """Between two that have bytes, whatever the order of the names."""
    header: dict[str, object] = {
        f"t{at}": {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]} for at in range(40)
    }
    header["empty"] = {"dtype": "U8", "shape": [0], "data_offsets": [39, 39]}
    seen = inspect(raw(header, bytes(range(40))), [4096])
    assert [one.name for one in seen][-2:] == ["empty", "t39"]
    assert [one.zeros for one in seen] == [1, *[0] * 40]
