"""What a worker believes of a message: its one job id."""

from __future__ import annotations

import json
import logging
from base64 import b64decode

import pytest
from fixtures import forged

from weighbridge.workers.messages import Dropped, Forged, clean


def test_what_is_no_message_of_ours_is_dropped() -> None:
    """By a rule in words of ours: nothing that a stranger wrote is in them, and none is long."""
    count = 0
    for text in forged.wrong():
        try:
            envelope = json.loads(text)
        except (ValueError, RecursionError):
            continue  # the channel drops it
        with pytest.raises(Forged) as rule:
            clean(envelope)
        assert len(str(rule.value)) < 80
        count += 1
    assert count > 40


def test_of_an_odd_message_the_job_id_is_left() -> None:
    """No header, time, callback or group of it reaches Celery, and its id is a new one each time."""
    ids = set()
    for text in forged.odd(17):
        given = json.loads(text)
        found = clean(given)
        assert json.loads(b64decode(found["body"])) == [[17], {}, {}]
        assert found["headers"].keys() == {"lang", "task", "id"}
        assert found["properties"]["delivery_tag"] == given["properties"]["delivery_tag"]
        assert found["properties"]["delivery_info"] == {"exchange": "x", "routing_key": "y"}
        assert "evil" not in json.dumps(found)
        ids.add(found["headers"]["id"])
    assert len(ids) == len(list(forged.odd(17)))


def test_a_flood_of_them_is_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """And the next line says how many there were."""
    now = [0.0]
    dropped = Dropped(lambda: now[0])
    with caplog.at_level(logging.WARNING):
        for second in range(90):
            now[0] = float(second)
            for _ in range(1000):
                dropped.say("it is no JSON")
        dropped.say("it is no object")
    assert [record.message for record in caplog.records] == [
        "a forged message was dropped: it is no JSON",
        "a forged message was dropped: it is no JSON (and 59999 more like it)",
        "a forged message was dropped: it is no object",
    ]
