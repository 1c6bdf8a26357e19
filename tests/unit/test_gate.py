"""Which connection makes room for another."""

from __future__ import annotations

import resource

import pytest

from weighbridge.inbound.gate import Gate, that_this_process_can_hold


def knock(gate: Gate[str], one: str, address: str) -> str | None:
    """What a server does: end what is in the way, then let in. Answers what was ended; fails where nothing could be."""
    if (ended := gate.in_the_way(address)) is not None:
        gate.leave(ended)
    assert gate.enter(one, address)
    return ended


def test_the_one_that_waited_longest_makes_room() -> None:
    """Silent connections lock nobody out; what is being answered stays."""
    gate = Gate[str](4, 4)
    for one in "abcd":
        assert knock(gate, one, "x") is None
    gate.work("a")
    gate.wait("b")  # it went on
    assert knock(gate, "e", "x") == "c"
    assert knock(gate, "f", "y") == "d"
    assert len(gate) == 4


def test_with_every_request_being_answered_the_newcomer_is_refused() -> None:
    """Nothing that waits for us is ended."""
    gate = Gate[str](2, 2)
    for one in "ab":
        knock(gate, one, "x")
        gate.work(one)
    assert gate.in_the_way("y") is None
    assert not gate.enter("c", "y")
    gate.wait("a")
    assert knock(gate, "c", "y") == "a"


def test_an_address_has_a_share_and_loses_its_own_connections_first() -> None:
    """The other address's are older, and stay."""
    gate = Gate[str](10, 3)
    knock(gate, "other", "y")
    for one in "abc":
        knock(gate, one, "x")
    assert knock(gate, "d", "x") == "a"
    for one in "bcd":
        gate.work(one)
    assert gate.in_the_way("x") is None
    assert not gate.enter("e", "x")
    assert "other" in gate


def test_in_all_the_address_with_most_connections_makes_room() -> None:
    """One of many addresses does not push out the only connection of another."""
    gate = Gate[str](4, 4)
    for one, address in [("only", "y"), ("a", "x"), ("b", "x"), ("c", "x")]:
        knock(gate, one, address)
    assert knock(gate, "new", "z") == "a"


def test_nothing_is_left_of_what_left() -> None:
    """Twice is no error, and what is not held neither waits nor works."""
    gate = Gate[str](2, 2)
    knock(gate, "a", "x")
    for _ in range(2):
        gate.leave("a")
    gate.wait("a")
    gate.work("a")
    assert (len(gate), gate._counts, gate._waiting) == (0, {}, {})


def test_no_more_connections_than_files_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past that accept() fails, for everybody."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert that_this_process_can_hold(2000) == 1024 - 128
    assert that_this_process_can_hold(10) == 10
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert that_this_process_can_hold(2000) == 2000
