"""`weighbridge up`: the whole path with every process that it has in production, down to answers over HTTP."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from fixtures.digits import Digits
from fixtures.running import START_SECONDS, StartUp, Up
from fixtures.worker import until

pytestmark = pytest.mark.slow


@pytest.fixture
def shop(start_up: StartUp, digits: Digits, digits_linear: Any) -> Up:
    """Everything runs; a program is registered, and the model has its wishes."""
    up = start_up()
    up.register(digits_linear)
    up.wish(digits)
    return up


def test_a_drop_goes_live_and_a_second_start_goes_on(shop: Up, digits: Digits, start_up: StartUp) -> None:
    """Both hosts answer from the dropped weights. Ctrl-C ends every process. Started again, the same addresses serve,
    what was dropped meanwhile is found, and no version is made twice."""
    shop.publish("monday", digits.train(rows=500))
    assert shop.client.wait("digits", path="digits/monday/", timeout=START_SECONDS).status == "ready"
    until("both hosts answer", lambda: shop.serving() == ["1", "1"], START_SECONDS)
    version = shop.client.version("digits", 1)
    for _, logits in shop.answers(digits.held_out):
        assert (logits.argmax(axis=1) == digits.held_out_labels).mean() == pytest.approx(digits.accuracy(version))

    assert shop.stop(signal.SIGINT) == 0
    until("every process is gone", lambda: not shop.left(), 5)

    shop.publish("meanwhile", digits.train(rows=1397))
    again = start_up()
    assert again.where.pop("browser") != shop.where.pop("browser"), "an address for a browser is good once"
    assert again.where == shop.where
    until("both hosts answer with it", lambda: again.serving() == ["2", "2"], START_SECONDS)
    assert again.statuses() == {"digits/monday/": "ready", "digits/meanwhile/": "ready"}


def test_killed_children_are_started_again(shop: Up, digits: Digits) -> None:
    """Each role in turn; what serves goes on serving while the others are away, and the path works afterwards."""
    shop.publish("monday", digits.train(rows=500))
    until("both hosts answer", lambda: shop.serving() == ["1", "1"], START_SECONDS)
    for role in ("daemon", "worker", "registry", "valkey"):
        shop.kill(role)
        assert shop.serving() == ["1", "1"]
        assert f"{role} ended (killed by SIGKILL)" in shop.log()
    shop.kill("host-1")
    shop.publish("tuesday", digits.train(rows=1397))
    until("both hosts answer with it", lambda: shop.serving() == ["2", "2"], START_SECONDS)
    assert shop.statuses() == {"digits/monday/": "ready", "digits/tuesday/": "ready"}
