"""Computes requests that already wait together as one batch, and gives each its own rows back. No sockets.

A row's numbers may then differ in their last bits with what it was batched with: matrix kernels sum in another order
for another number of rows. The reference golden bounds that (it is proven whole and for one row by itself), but bit
for bit it is not the same, so `HostSettings.batch` is 1 unless the operator chooses otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np

from weighbridge.engines.protocols import Array, Session

Inputs = dict[str, Array]


def batchable(session: Session) -> bool:
    """Whether every input and output has rows: axis 0 free."""
    return all(spec.shape[:1] == (-1,) for spec in (*session.inputs, *session.outputs))


def groups(asked: Sequence[Inputs], rows: int) -> Iterator[list[int]]:
    """Indices that can be computed together: same names, datatypes and row shapes, at most `rows` rows in sum."""
    open_groups: dict[object, tuple[list[int], int]] = {}
    for index, inputs in enumerate(asked):
        count = row_count(inputs)
        signature = tuple((name, array.dtype, array.shape[1:]) for name, array in sorted(inputs.items()))
        members, held = open_groups.get(signature, ([], 0))
        if not count or held + count > rows:  # what breaks the contract is told so by itself
            yield [index]
        else:
            members.append(index)
            open_groups[signature] = members, held + count
    yield from (members for members, _ in open_groups.values())


def infer(session: Session, asked: Sequence[Inputs]) -> list[dict[str, Array]]:
    """The outputs of each, from one call. Raises what the session raises, and ValueError when rows got lost."""
    joined = {name: np.concatenate([inputs[name] for inputs in asked]) for name in asked[0]}
    bounds = list(accumulate((row_count(inputs) for inputs in asked), initial=0))
    outputs = session.infer(joined)
    if any(array.shape[:1] != (bounds[-1],) for array in outputs.values()):
        raise ValueError(f"the program gave other than {bounds[-1]} rows: it cannot be batched")
    return [{name: array[start:end] for name, array in outputs.items()} for start, end in pairwise(bounds)]


def row_count(inputs: Mapping[str, Array]) -> int:
    """The rows that all inputs have; 0 where they differ or one has none."""
    counts = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
    return counts.pop() if len(counts) == 1 else 0
