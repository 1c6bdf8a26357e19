"""What a log line keeps to itself, and what it does not."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from weighbridge import logs
from weighbridge.logs import Redact


@pytest.mark.parametrize(
    "text",
    [
        *("weighbridge.daemon.intake", "/srv/weighbridge/data", "the weighbridge daemon", "weighbridge started"),
        *("import weighbridge", "x=weighbridge.db", "weighbridge-data", "unweighbridge=1"),
    ],
)
def test_an_ordinary_word_stays_a_word(text: str) -> None:
    """A secret that is one is in the names of loggers, folders and commands."""
    assert Redact(["weighbridge"])(text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weighbridge", "***"),
        ("password=weighbridge", "password=***"),
        ("password = 'weighbridge', user = 'x'", "password = '***', user = 'x'"),
        ("key: weighbridge", "key: ***"),
        ("redis://:weighbridge@host/0", "redis://:***@host/0"),
        ('{"secret": "weighbridge"}', '{"secret": "***"}'),
    ],
)
def test_an_ordinary_word_is_hidden_as_a_value(text: str, said: str) -> None:
    """Wherever it stands as one: alone, in quotes, behind = or a colon."""
    assert Redact(["weighbridge"])(text) == said


def test_what_is_no_word_is_hidden_everywhere() -> None:
    """Also inside of something else."""
    assert Redact(["hunter2-key"])("a/hunter2-keys and hunter2-key") == "a/***s and ***"


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.LogRecord]:
    try:
        raise RuntimeError("no way to redis://:hunter2-key@b/0")
    except RuntimeError:
        yield logging.LogRecord("hunter2-key.intake", 40, __file__, 1, "key=%s", ("hunter2-key",), sys.exc_info())


def test_the_name_of_a_logger_is_nobodys_secret(error: logging.LogRecord) -> None:
    """Message and traceback are cleaned, in lines and in JSON; time is UTC and says so."""
    error.created = 86400.25
    error.msecs = 250.0
    line = logs.HumanFormatter(Redact(["hunter2-key"])).format(error)
    assert line.startswith("00:00:00.250Z ERROR   hunter2-key.intake: key=***")
    assert line.endswith("RuntimeError: no way to redis://:***@b/0")
    told = json.loads(logs.JsonFormatter(Redact(["hunter2-key"])).format(error))
    assert (told["logger"], told["message"]) == ("hunter2-key.intake", "key=***")
    assert told["time"] == "1970-01-02T00:00:00.250+00:00"
    assert "hunter2-key@" not in told["exception"]
