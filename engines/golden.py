"""Golden files: inputs with the outputs they must give, as safetensors named `input.<name>` and `output.<name>`.

Imports without torch: the session runs the program, the comparison is numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weighbridge.engines import tensor_file, tensors
from weighbridge.engines.errors import GoldenMismatch, InvalidInput
from weighbridge.engines.protocols import Array, Arrays, Session
from weighbridge.engines.spread import Tolerance, Wanted

__all__ = ["TOLERANCES", "Tolerance", "check", "compare", "make_reference", "read", "tolerance", "variant_tolerance"]

TOLERANCES: dict[str, Tolerance] = {
    "FP64": Tolerance(1e-8, 1e-12, 1e-6),
    "FP32": Tolerance(2e-5, 1e-9, 5e-4),
    "FP16": Tolerance(4e-3, 1e-7, 0.03),
    "BF16": Tolerance(2e-2, 1e-8, 0.08),
}
"""By the dtype that the program computes in. `rtol` is some five roundings of it (what no spread can be told from),
`spread` what machines, batch sizes and thread counts differ by, with room; other weights differ by more than 1. `atol`
is there for what is rounding and nothing else."""
_FROM_WEIGHTS = {"F64": "FP64", "F32": "FP32", "F16": "FP16", "BF16": "BF16"}
_FROM_COMPUTED: dict[str, Tolerance] = {
    **{dtype: TOLERANCES[name] for dtype, name in _FROM_WEIGHTS.items()},
    "I8": Tolerance(2e-2, 1e-8, 0.1),
    "U8": Tolerance(2e-2, 1e-8, 0.1),
    "F8_E4M3": Tolerance(4e-2, 1e-8, 0.15),
}
"""Where activations are quantized too, a difference in the last bit of float32 moves one to the next step, by 1/127 of
the largest in its row (int8) or 1/8 of itself (fp8); over a row of 64 that is 1 or 2% of a typical output."""


def tolerance(weight_dtypes: Sequence[str]) -> Tolerance:
    """For weights of these safetensors dtypes: that of the coarsest floating one, else FP32's."""
    found = [TOLERANCES[_FROM_WEIGHTS[dtype]] for dtype in weight_dtypes if dtype in _FROM_WEIGHTS]
    return max(found, default=TOLERANCES["FP32"])


def variant_tolerance(dtypes: Sequence[str]) -> Tolerance:
    """For a variant that computes in these safetensors dtypes, integers where it quantizes activations."""
    found = [_FROM_COMPUTED[one] for one in dtypes if one in _FROM_COMPUTED]
    return max(found, key=lambda one: one.spread, default=TOLERANCES["FP32"])


def make_reference(session: Session, n: int = 4, seed: int = 0) -> bytes:
    """Record the answers to `n` rows of synthetic inputs. Raises GoldenMismatch when one is not finite.

    An answer may hold −inf (a masked class) beside finite values.
    """
    inputs = tensors.synthetic(session.inputs, size=n, seed=seed)
    outputs = session.infer(inputs)
    for name, value in outputs.items():
        if value.dtype.kind in "fV" and not _ordinary(value.astype(np.float64)):
            raise GoldenMismatch(f"output {name} is not finite for ordinary inputs", worst=float("inf"))
    named = {f"input.{name}": value for name, value in inputs.items()}
    named |= {f"output.{name}": np.ascontiguousarray(value) for name, value in outputs.items()}
    return tensor_file.save(named)


def _ordinary(value: Array) -> bool:
    """Numbers, or −inf in a row that has numbers too."""
    finite = np.isfinite(value)
    return bool(finite.all() or (np.isneginf(value[~finite]).all() and value.ndim > 1 and finite.any(-1).all()))


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


def check(session: Session, golden: bytes, rtol: float, atol: float, spread: float = 0.0) -> None:
    """Run the golden inputs whole, and their first row by itself; both must match (`compare` says how).

    Raises GoldenMismatch naming the output, InvalidInput when the file does not fit the session.
    """
    inputs, wanted = _wanted(session, golden, Tolerance(rtol, atol, spread))
    must_match(session.infer(inputs), wanted)
    if _rows(session, inputs) > 1:
        one, first = _first(session, inputs, wanted)
        must_match(session.infer(one), first)


def first_row(
    session: Session, golden: bytes, rtol: float, atol: float, spread: float = 0.0
) -> tuple[Arrays, dict[str, Wanted]]:
    """The golden's first row by itself (all of it where axis 0 is no batch), and what `must_match` wants for it.

    Raises InvalidInput when the file does not fit the session.
    """
    inputs, wanted = _wanted(session, golden, Tolerance(rtol, atol, spread))
    return _first(session, inputs, wanted) if _rows(session, inputs) > 1 else (inputs, wanted)


def _wanted(session: Session, golden: bytes, tolerance: Tolerance) -> tuple[Arrays, dict[str, Wanted]]:
    inputs, expected = read(golden)
    unknown = expected.keys() - {spec.name for spec in session.outputs}
    if unknown:
        raise InvalidInput(f"golden: the program has no output {min(unknown)}")
    return inputs, {name: Wanted.of(value, tolerance) for name, value in expected.items()}


def _rows(session: Session, inputs: Arrays) -> int:
    """How many rows the inputs are; 1 where axis 0 is no batch."""
    batched = [spec.name for spec in session.inputs if spec.shape and spec.shape[0] == -1]
    return inputs[batched[0]].shape[0] if batched else 1


def _first(session: Session, inputs: Arrays, wanted: Mapping[str, Wanted]) -> tuple[Arrays, dict[str, Wanted]]:
    alone = {spec.name for spec in session.outputs if spec.shape and spec.shape[0] == -1}
    first = {name: one.row(0) if name in alone else one for name, one in wanted.items()}
    return tensors.rows(inputs, 0, 1, session.inputs), first


def compare(
    seen: Mapping[str, Array], expected: Mapping[str, Array], rtol: float, atol: float, spread: float = 0.0
) -> None:
    """Raise GoldenMismatch where |seen − expected| > atol + rtol · |expected| + spread · scale, or the shapes differ.

    `scale` is how far the expected values vary (`engines.spread`). With a `spread`, whole numbers and booleans match
    in all but that share of the elements.
    """
    tolerance = Tolerance(rtol, atol, spread)
    must_match(seen, {name: Wanted.of(value, tolerance) for name, value in expected.items()})


def must_match(seen: Mapping[str, Array], wanted: Mapping[str, Wanted]) -> None:
    """Raise GoldenMismatch naming the output that is not there, or not what is wanted."""
    for name, want in wanted.items():
        if name not in seen:
            raise GoldenMismatch(f"there is no output {name}", worst=float("inf"))
        if wrong := want.differs(seen[name]):
            raise GoldenMismatch(f"output {name} {wrong.said}", worst=wrong.worst)
