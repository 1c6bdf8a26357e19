"""One malformed template harms the checkpoints that it is for, and no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weighbridge.engines.binding import Parameter, fingerprint
from weighbridge.registry.recipe import ProgramWish
from weighbridge.workers import bindings

TENSORS = {"w": Parameter(shape=(4,), dtype="F32")}
GOOD = {
    "name": "good",
    "digest": "a" * 64,
    "fingerprint": fingerprint(TENSORS),
    "parameters": {"w": {"shape": [4], "dtype": "F32"}},
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [],
}


def programs(**wrong: Any) -> bindings.Programs:
    rows: list[Any] = [SimpleNamespace(**GOOD), SimpleNamespace(**{**GOOD, "name": "bad", **wrong})]
    return bindings.Programs(*bindings.of_rows(rows)[:1], malformed=bindings.of_rows(rows)[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": {"w": {"shape": "many"}}},
        {"parameters": {"w": None}},
        {"parameters": ["w"]},
        {"parameters": None},
        {"inputs": [{"name": "x"}]},
        {"inputs": 5},
        {"outputs": [None]},
    ],
)
def test_a_row_that_does_not_parse_harms_its_own_only(wrong: dict[str, Any]) -> None:
    """A checkpoint of another program binds as if it were not there; who names it is told why."""
    known = programs(**wrong)
    assert list(known.malformed) == ["bad"]
    assert bindings.find(TENSORS, known).program.name == "good"
    with pytest.raises(bindings.Unbound, match="bad, but its row does not parse"):
        bindings.find(TENSORS, known, ProgramWish(template="bad"))
    other = {"v": Parameter(shape=(1,), dtype="F32")}
    with pytest.raises(bindings.Unbound, match="template bad may fit, but its row does not parse"):
        bindings.find(other, known)
