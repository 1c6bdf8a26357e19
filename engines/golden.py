"""Golden files: inputs with the outputs they must give, as safetensors named `input.<name>` and `output.<name>`.

Imports without torch: the session runs the program, the comparison is numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weighbridge.engines import tensor_file, tensors
from weighbridge.engines.errors import GoldenMismatch, InvalidInput
from weighbridge.engines.protocols import Array, Session

TOLERANCES: dict[str, tuple[float, float]] = {
    "FP64": (1e-6, 1e-8),
    "FP32": (1e-4, 1e-5),
    "FP16": (1e-2, 1e-2),
    "BF16": (3e-2, 3e-2),
}
"""(rtol, atol) by the dtype that the program computes in; machines, batch sizes and thread counts differ below them."""
_FROM_WEIGHTS = {"F64": "FP64", "F32": "FP32", "F16": "FP16", "BF16": "BF16"}
_FROM_COMPUTED: dict[str, tuple[float, float]] = {
    **{dtype: TOLERANCES[name] for dtype, name in _FROM_WEIGHTS.items()},
    "I8": (3e-2, 3e-2),
    "U8": (3e-2, 3e-2),
    "F8_E4M3": (6e-2, 6e-2),
}
"""Where activations are quantized too, a difference in the last bit of float32 moves one to the next step, by 1/127 of
the largest in its row (int8) or 1/8 of itself (fp8); over a row of 64 that is 1 or 2% of a typical output."""


def tolerance(weight_dtypes: Sequence[str]) -> tuple[float, float]:
    """(rtol, atol) for weights of these safetensors dtypes: that of the coarsest floating one, else FP32's."""
    found = [TOLERANCES[_FROM_WEIGHTS[dtype]] for dtype in weight_dtypes if dtype in _FROM_WEIGHTS]
    return max(found, default=TOLERANCES["FP32"])


def variant_tolerance(dtypes: Sequence[str], outputs: Mapping[str, Array]) -> tuple[float, float]:
    """(rtol, atol) for a variant that computes in these safetensors dtypes, integers where it quantizes activations.

    Coarser than float32, `atol` is a share of the outputs' root mean square: an answer near zero is as uncertain as
    its neighbours, and outputs that are all small are not let pass.
    """
    rtol, atol = max((_FROM_COMPUTED[one] for one in dtypes if one in _FROM_COMPUTED), default=TOLERANCES["FP32"])
    if rtol <= TOLERANCES["FP32"][0]:
        return rtol, atol
    sizes = [float(np.sqrt(np.mean(np.square(value.astype(np.float64))))) for value in outputs.values() if value.size]
    return rtol, max(atol * max(sizes, default=1.0), TOLERANCES["FP32"][1])


def make_reference(session: Session, n: int = 4, seed: int = 0) -> bytes:
    """Record the answers to `n` rows of synthetic inputs. Raises GoldenMismatch when one is not finite."""
    inputs = tensors.synthetic(session.inputs, size=n, seed=seed)
    outputs = session.infer(inputs)
    for name, value in outputs.items():
        if value.dtype.kind in "fV" and not np.isfinite(value.astype(np.float64)).all():
            raise GoldenMismatch(f"output {name} is not finite for ordinary inputs", worst=float("inf"))
    named = {f"input.{name}": value for name, value in inputs.items()}
    named |= {f"output.{name}": np.ascontiguousarray(value) for name, value in outputs.items()}
    return tensor_file.save(named)


def read(data: bytes) -> tuple[dict[str, Array], dict[str, Array]]:
    """(inputs, outputs) of a golden file. Raises InvalidInput when it is none."""
    try:
        named = tensor_file.load(data)
    except InvalidInput as exc:
        raise InvalidInput(f"the golden file: {exc}") from exc
    inputs = {name.removeprefix("input."): value for name, value in named.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): value for name, value in named.items() if name.startswith("output.")}
    if not inputs or not outputs or len(inputs) + len(outputs) != len(named):
        raise InvalidInput("a golden file holds tensors named input.<name> and output.<name>, and no others")
    return inputs, outputs


def check(session: Session, golden: bytes, rtol: float, atol: float) -> None:
    """Run the golden inputs whole, and their first row by itself; both must match.

    Raises GoldenMismatch naming the output, InvalidInput when the file does not fit the session.
    """
    inputs, expected = read(golden)
    unknown = expected.keys() - {spec.name for spec in session.outputs}
    if unknown:
        raise InvalidInput(f"golden: the program has no output {min(unknown)}")
    compare(session.infer(inputs), expected, rtol, atol)
    batched = [spec for spec in session.inputs if spec.shape and spec.shape[0] == -1]
    if batched and inputs[batched[0].name].shape[0] > 1:
        one = session.infer(tensors.rows(inputs, 0, 1, session.inputs))
        compare(one, tensors.rows(expected, 0, 1, session.outputs), rtol, atol)


def compare(seen: Mapping[str, Array], expected: Mapping[str, Array], rtol: float, atol: float) -> None:
    """Raise GoldenMismatch where |seen − expected| > atol + rtol · |expected|, or the shapes differ."""
    for name, want in expected.items():
        got = seen[name]
        if got.shape != want.shape:
            raise GoldenMismatch(
                f"output {name} has shape {list(got.shape)}, not {list(want.shape)}", worst=float("inf")
            )
        difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
        excess = difference - (atol + rtol * np.abs(want.astype(np.float64)))
        if not (excess <= 0).all():
            worst = float(np.nan_to_num(excess, nan=np.inf).max())
            raise GoldenMismatch(
                f"output {name} differs by up to {float(difference.max()):.3g} (allowed: {atol:g} + {rtol:g}·|value|)",
                worst=worst,
            )
