"""What a request takes: fitted from a few measurements, known before it is computed, learned upwards."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
import pytest
from fixtures.fake_engine import FakeSession

from weighbridge.engines.errors import InvalidInput
from weighbridge.engines.manifest import Manifest, TensorSpec
from weighbridge.hosts import frames, meter
from weighbridge.hosts.background import Background
from weighbridge.hosts.costs import BLOCK_SECONDS, SAFETY, Costs, Curve, measure
from weighbridge.hosts.errors import TooCostly
from weighbridge.hosts.frames import Kind
from weighbridge.hosts.runner import Runner

MB = 1 << 20


class Priced:
    """A session and a meter in one: a call takes what a function of (rows, elements of one) says."""

    def __init__(
        self, shape: tuple[int, ...], takes: Callable[[int, int], float], seconds: float, longest: int
    ) -> None:
        self.inputs = (TensorSpec(name="x", datatype="FP32", shape=shape),)
        self.outputs = (TensorSpec(name="y", datatype="FP32", shape=(shape[0], 1)),)
        self._takes, self._seconds, self._longest = takes, seconds, longest
        self.largest = 0.0

    def infer(self, inputs: Any) -> dict[str, Any]:
        rows, each = inputs["x"].shape[0], int(np.prod(inputs["x"].shape[1:]))
        if each > self._longest:
            raise InvalidInput("too long")
        self.took = self._takes(rows, each), self._seconds * rows * each
        self.largest = max(self.largest, self.took[0])
        return {"y": np.zeros((rows, 1), np.float32)}

    def close(self) -> None: ...

    def of(self, call: Callable[[], Any]) -> tuple[Any, int, float]:
        result = call()
        return result, int(self.took[0]), self.took[1]


def priced(
    takes: Callable[[int, int], float],
    *,
    shape: tuple[int, ...] = (-1, 8),
    budget: int = 1000 * MB,
    seconds: float = 1e-9,
    longest: int = 1 << 30,
) -> Costs:
    session = Priced(shape, takes, seconds, longest)
    x = np.zeros((4, *(8 if size == -1 else size for size in shape[1:])), np.float32)
    costs = measure(session, {"x": x}, budget, session)  # type: ignore[arg-type]
    assert session.largest <= budget / 2
    return costs


def test_rows_of_a_fixed_size() -> None:
    """40 kB a row: a block is the power of two of rows that fits, with what safety demands."""
    costs = priced(lambda rows, each: rows * 40_000)
    rows = costs.at_once(8)
    assert rows * 40_000 * SAFETY <= 1000 * MB < rows * 2 * 40_000 * SAFETY
    assert rows & (rows - 1) == 0


class Interrupted(Priced):
    """Others have the processor for a while in the middle of each call."""

    def infer(self, inputs: Any) -> dict[str, Any]:
        time.sleep(2 * BLOCK_SECONDS)
        return super().infer(inputs)


def test_a_busy_machine_makes_no_small_blocks() -> None:
    """A version that was loaded while others had the processor cut large requests into a million blocks."""
    session = Interrupted((-1, 8), lambda rows, each: 0, 0.0, 1 << 30)
    costs = measure(session, {"x": np.zeros((4, 8), np.float32)}, 1000 * MB, meter.Meter(), seconds=0.0)
    assert costs.at_once(8) > 100


def test_a_slow_row_makes_small_blocks() -> None:
    """What takes 10 ms a row is cut so that others wait for one block only."""
    rows = priced(lambda rows, each: rows * 100, seconds=0.01 / 8).at_once(8)
    assert rows * 0.01 <= BLOCK_SECONDS < rows * 2 * 0.01


def test_the_square_of_a_length_is_found() -> None:
    """Attention: a row 100 times as long takes 10,000 times as much. What does not fit is told with what does."""
    costs = priced(lambda rows, each: rows * (200 * each + 50 * each**2), shape=(-1, -1))
    assert costs.curve.bytes(2000) == pytest.approx(200 * 2000 + 50 * 2000**2, rel=0.05)
    assert costs.at_once(2000) >= 1
    with pytest.raises(
        TooCostly, match=r"a row of 20000 elements takes about .* MB.* at most (\d+) elements fit"
    ) as told:
        costs.at_once(20_000)
    fitting = int(str(told.value).split("at most ")[1].split()[0])
    assert costs.at_once(fitting) == 1
    with pytest.raises(TooCostly):
        costs.at_once(int(fitting * 1.01))


def test_a_program_that_takes_no_other_length_is_priced_by_what_it_takes() -> None:
    """Lengths that it refuses are no error of the measurement."""
    costs = priced(lambda rows, each: rows * each * 1000, shape=(-1, -1), longest=8)
    assert costs.curve.square == 0
    assert costs.curve.linear == pytest.approx(1000, rel=0.01)


def test_a_program_without_rows_is_one_unit() -> None:
    """It cannot be cut: all of it fits, or it is refused."""
    costs = priced(lambda rows, each: rows * each * 1000, shape=(4, -1))
    assert costs.units({"x": np.zeros((4, 100))}) == (1, 400)
    assert costs.at_once(400) >= 1
    with pytest.raises(TooCostly, match="an input of"):
        costs.at_once(4_000_000)


def test_rows_that_differ_are_the_engines_to_refuse() -> None:
    """No rows, or other numbers of rows: one unit, and no division by zero."""
    costs = Costs(1000 * MB, rows=True, curve=Curve(1, 0, 0, 1))
    for inputs in (
        {"x": np.zeros((0, 4))},
        {"x": np.zeros((2, 4)), "y": np.zeros((3, 4))},
        {"x": np.zeros(())},
        {"x": np.zeros((5, 0))},
        {},
    ):
        units, elements = costs.units(inputs)
        assert costs.at_once(elements) >= 1
        assert units <= 5


def test_many_rows_with_their_answers_may_be_too_much() -> None:
    """Inputs and answers stay until the end: the refusal says how many rows fit, and so many do."""
    costs = Costs(100 * MB, rows=True, curve=Curve(100, 0, 1e-9, 2.0))
    with pytest.raises(TooCostly, match=r"at most (\d+) rows") as told:
        costs.demand(1_000_000, 64, 1_000_000 * 256, json=True)
    fitting = int(str(told.value).split("at most ")[1].split()[0])
    assert costs.demand(fitting, 64, fitting * 256, json=True) <= 100 * MB
    assert costs.demand(fitting * 3, 64, fitting * 3 * 256, json=False) <= 100 * MB


def test_it_learns_upwards_only() -> None:
    """A unit that took more than the curve says is cut smaller; one that took less changes nothing."""
    costs = Costs(1000 * MB, rows=True, curve=Curve(1000, 0, 0, 1))
    before = costs.at_once(8)
    costs.learn(10, 8, 10)
    assert costs.at_once(8) == before
    costs.learn(10, 8, 10 * 80_000)
    assert costs.at_once(8) <= before / 8
    costs.learn(10, 8, 10)
    assert costs.at_once(8) <= before / 8


def test_what_did_not_fit_is_halved_and_shuts_nobody_out() -> None:
    """Memory that is short shrinks the block, down to one unit; others of that size are not refused for it."""
    costs, tries = Costs(1000 * MB, rows=True, curve=Curve(1, 0, 0, 1)), []
    while not tries or tries[-1] > 1:
        tries.append(costs.at_once(8))
        costs.outgrew(tries[-1], 8)
    assert all(later <= earlier / 2 for earlier, later in pairwise(tries))
    costs.outgrew(1, 8)
    costs.learn(1, 8, 10_000 * MB)
    assert costs.at_once(8) == 1


def test_without_a_budget_nothing_is_refused() -> None:
    """A child that was given none computes what comes."""
    assert Costs().at_once(10**9) >= 1
    assert Costs(rows=True).demand(10, 10**9, 10**9, json=True) > 0


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (IndexError("index out of range in self"), False),
    ],
)
def test_a_shortage_of_memory_is_known_by_its_words(error: Exception, short: bool) -> None:
    """Engines have no common exception; what wraps one counts too."""
    wrapped = ValueError("the program failed")
    wrapped.__cause__ = error
    assert (meter.is_shortage(error), meter.is_shortage(wrapped)) == (short, short)


def test_the_meter_sees_what_a_call_takes_and_gives_back() -> None:
    """The peak within the call, also when nothing is left of it."""
    _, grown, seconds = meter.Meter().of(lambda: float(np.ones(8 << 20).sum()))
    assert 60 * MB < grown < 140 * MB
    assert seconds > 0
    assert meter.machine_bytes() > 256 * MB


def test_an_answer_that_outgrows_the_host_is_refused() -> None:
    """The front holds an answer whole: one of over sixteen times the largest body gets 413, and the next is served."""
    specs = (TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),)
    runner = Runner(lambda: None, Background(), body_limit=400)  # type: ignore[arg-type,return-value]
    runner._session = FakeSession(Manifest.model_construct(inputs=specs, outputs=specs), 1.0)
    ours, theirs = socket.socketpair()
    with ours, ThreadPoolExecutor(1) as pool:
        served = pool.submit(runner.serve, theirs)
        for rows, status in ((500, 413), (5, 200)):
            tensor = {"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": [1] * (rows * 4)}
            body = orjson.dumps({"inputs": [tensor]})
            frames.write(ours, frames.head(Kind.INFER, 1, {"deadline": float("1e12")}, len(body)), [body])
            answer = frames.read(ours)
            assert answer is not None
            assert answer.meta["status"] == status
        frames.write(ours, frames.head(Kind.EXIT, 0, {}), [])
        served.result(20)
    theirs.close()
