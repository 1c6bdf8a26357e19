"""What the registry lets one client, and all together, hold and do at once; and what JSON may cost."""

from __future__ import annotations

import json

import pytest

from weighbridge.registry.api import bodies
from weighbridge.registry.api.bodies import Held
from weighbridge.registry.api.calls import Calls
from weighbridge.registry.errors import Unavailable
from weighbridge.storage import strict_json


@pytest.mark.parametrize("text", [b'{"a": [[1]], "b": "x,:[{"}', b'{"a": {"b": [1.5e3, -2]}}'])
def test_a_budget_lets_pass_what_is_within(text: bytes) -> None:
    """And what is in strings counts little, however it looks."""
    assert strict_json.within(text, values=20, depth=3) == json.loads(text)


def test_bytes_are_held_by_client() -> None:
    """One client's part is a quarter, or one template; all have a sum; what is given back is there again."""
    most = 8 * bodies.MAX_TEMPLATE
    held = Held(most)
    for client in "abcd":
        held.take(client, most // 4)
    with pytest.raises(Unavailable):
        held.take("e", 1)
    held.release("a", most // 4)
    held.take("e", 1)
    with pytest.raises(Unavailable):
        held.take("b", 1)
    held.release("e", 1)
    for client in "bcd":
        held.release(client, most // 4)
    assert len(held) == 0


def test_calls_are_counted_by_client_and_those_that_wait_apart() -> None:
    """A client with all of its turns keeps no other from his, and a thousand that wait for news keep nobody."""
    calls = Calls(8, 4)
    with calls.one("a", waits=False), calls.one("a", waits=False):
        with pytest.raises(Unavailable), calls.one("a", waits=False):
            pass
        with calls.one("b", waits=False), calls.one("a", waits=True):
            pass
        with pytest.raises(Unavailable), calls.one("c", waits=True), calls.one("c", waits=True):
            pass
    with calls.one("a", waits=False), calls.one("c", waits=True):
        pass
