"""The frame parser, the routes and the slot statistics by themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.fake_engine import FakeSession
from fixtures.serving import fake_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge.engines.manifest import Manifest
from weighbridge.hosts import batching, frames
from weighbridge.hosts.blame import Blame
from weighbridge.hosts.errors import ModelNotFound, NotReady, VersionNotLoaded
from weighbridge.hosts.frames import Frame, Kind, Parser
from weighbridge.hosts.front import Target, parse_target
from weighbridge.hosts.router import Slot, Slots
from weighbridge.hosts.statistics import BOUNDS, Statistics


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=6),
    st.lists(st.integers(1, 200), max_size=30),
)
def test_frames_survive_any_fragmentation(sent: list[tuple[int, bytes]], cuts: list[int]) -> None:
    """However the bytes arrive, the same frames come out, in order."""
    stream = b"".join(frames.head(Kind.INFER, id, {"n": id}, len(body)) + body for id, body in sent)
    parser, seen, at = Parser(), [], 0
    for size in [*cuts, len(stream)]:
        seen += list(parser.feed(stream[at : at + size]))
        at += size
    assert seen == [Frame(Kind.INFER, id, {"n": id}, body) for id, body in sent]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/v2/models/m", Target("m", None, "")),
        ("/v2/models/m/infer", Target("m", None, "infer")),
        ("/v2/models/m/versions/3", Target("m", "3", "")),
        ("/v2/models/m/versions/3/infer", Target("m", "3", "infer")),
        ("/v2/models/ready/ready", Target("ready", None, "ready")),
        ("/v2/models/infer", Target("infer", None, "")),
        ("/v2/models/m/versions/ready", Target("m", "ready", "")),
        ("/v2/models/", None),
        ("/v2/models//infer", None),
        ("/v2/models/m/versions//infer", None),
        ("/v2/models/m/x/3/infer", None),
        ("/v2/models/m/versions/3/infer/", None),
    ],
)
def test_paths_name_a_model_a_version_and_a_verb(path: str, target: Target | None) -> None:
    """A model may be called `ready`; anything else under /v2/models/ is no target."""
    assert parse_target(path) == target


def test_routes_change_whole(tmp_path: Path) -> None:
    """A slot is addressable when added, gets unversioned requests when switched to, and vanishes when removed."""
    slots = Slots()
    with pytest.raises(ModelNotFound):
        slots.find("scale", None)
    first, second = Slot(fake_spec(tmp_path, "1")), Slot(fake_spec(tmp_path, "2"))
    slots.add(first)
    assert slots.find("scale", "1") is first
    with pytest.raises(NotReady):
        slots.find("scale", None)
    slots.add(second)
    assert slots.switch(first) is None
    assert slots.switch(second) is first
    assert slots.find("scale", None) is second
    slots.remove(second)
    with pytest.raises(VersionNotLoaded):
        slots.find("scale", "2")
    slots.remove(first)
    assert list(slots) == []


def test_an_interval_holds_what_happened_since_the_last_one() -> None:
    """Intervals do not overlap and lose nothing; what says nothing about the version is none of its requests."""
    seen = Statistics()
    for fault, seconds in [(Blame.NONE, 0.0001), (Blame.CLIENT, 0.5), (Blame.VERSION, 1000.0), (Blame.NOBODY, 0.5)]:
        seen.record(fault, seconds)
    first = seen.take("7-1")
    assert (first.id, first.requests, first.blamed[Blame.VERSION]) == ("7-1", 2, 1)
    assert (first.counts[0], first.counts[-1], sum(first.counts)) == (1, 1, 4)
    seen.record(Blame.INPUT, 0.002)
    second = seen.take("7-2")
    assert (second.requests, dict(second.blamed), sum(second.counts)) == (1, {Blame.INPUT: 1}, 1)
    assert second.latency_sum == pytest.approx(0.002)
    assert seen.requests == 5


def test_what_fits_together_is_batched() -> None:
    """Same names, datatypes and row shapes, up to the limit; what has no rows of its own stays alone."""
    one, two = np.ones((1, 3), np.float32), np.full((2, 3), 2, np.float32)
    asked = [{"x": one}, {"x": two}, {"x": one.astype(np.float64)}, {"x": one[:0]}, {"x": one[:, :2]}, {"x": two}]
    assert sorted(batching.groups(asked, 4)) == [[0, 1], [2], [3], [4], [5]]
    assert sorted(batching.groups([{"x": one, "y": two}, {"x": one, "y": one}], 4)) == [[0], [1]]


def test_a_batch_gives_each_its_rows() -> None:
    """And a program that does not keep rows apart is refused."""
    session = FakeSession(Manifest.model_construct(inputs=(), outputs=()), 3.0)
    asked = [{"x": np.full((rows, 2), rows, np.float32)} for rows in (1, 3, 2)]
    for inputs, outputs in zip(asked, batching.infer(session, asked), strict=True):
        np.testing.assert_array_equal(outputs["y"], inputs["x"] * 3)
    session.infer = lambda inputs: {"y": inputs["x"][:1]}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="cannot be batched"):
        batching.infer(session, asked)


@given(st.floats(0, 200))
def test_a_latency_is_counted_under_the_first_bound_that_covers_it(seconds: float) -> None:
    """Bounds are upper and inclusive, like Prometheus' `le`."""
    seen = Statistics()
    seen.record(Blame.NONE, seconds)
    bucket = seen.counts.index(1)
    assert bucket == len(BOUNDS) or seconds <= BOUNDS[bucket]
    assert bucket == 0 or seconds > BOUNDS[bucket - 1]
