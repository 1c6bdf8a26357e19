"""Logging of every process: the standard library's, as lines for people or JSON, with secrets taken out.

Secrets are removed from the finished line, tracebacks included, because that is where they leak.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, SecretStr

from weighbridge import escapes

HIDDEN = "***"
_PATTERNS = (
    re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+(?=@)"),  # user:password@ in a URL
    re.compile(r"(?i)(bearer\s+)[\w.~+/=-]{8,}"),
    re.compile(r"(?i)((?:x-amz-(?:signature|credential|security-token)|sig|token|password|secret)=)[^&\s\"']+"),
)
_REPLACEMENTS = (rf"\1:{HIDDEN}", rf"\1{HIDDEN}", rf"\1{HIDDEN}")
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


_WORDS = re.compile(r"[A-Za-z]+([-_. ][A-Za-z]+)*")
"""A secret of ordinary words: texts hold them where they are none, as in the name of a logger or a folder."""


class Redact:
    """Takes known secrets, and what looks like one, out of a text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # Short values would blank ordinary words; longest first, so that one within another leaves no rest.
        known = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)
        self._known = [secret for secret in known if not _WORDS.fullmatch(secret)]
        self._words = [_as_value(secret) for secret in known if _WORDS.fullmatch(secret)]

    def __call__(self, text: str) -> str:
        for secret in self._known:
            text = text.replace(secret, HIDDEN)
        for word in self._words:
            text = word.sub(rf"\g<before>{HIDDEN}", text)
        for pattern, replacement in zip(_PATTERNS, _REPLACEMENTS, strict=True):
            text = pattern.sub(replacement, text)
        return text


def _as_value(word: str) -> re.Pattern[str]:
    """The word where it stands as a value: alone, in quotes, or behind `=` or `:`."""
    there = rf"(?<![\w./-]){re.escape(word)}(?![\w.-])"
    return re.compile(rf"(?P<before>^(?={re.escape(word)}$)|[=:]\s?[\"']?|[\"']){there}")


class HumanFormatter(logging.Formatter):
    """`13:08:01.250Z INFO    weighbridge.daemon.intake: digits/run-1 is complete (P2)`. Times are UTC."""

    converter = staticmethod(time.gmtime)

    def __init__(self, redact: Redact) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
        self._redact = redact

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line whatever it quotes, so that a name from a bucket writes no line of its own; tracebacks follow."""
        said = copy.copy(record)
        said.message = self._redact(record.message)
        return escapes.line(super().formatMessage(said))

    def formatException(self, ei: Any) -> str:
        """Indented, so that no line of a message can be taken for an entry."""
        return escapes.indented(self._redact(super().formatException(ei)))

    def formatStack(self, stack_info: str) -> str:
        return escapes.indented(self._redact(stack_info))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, `extra` fields, exception."""

    def __init__(self, redact: Redact) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        kept = ("time", "level", "logger")  # none of them is anybody's text
        cleaned = {key: value if key in kept else self._clean(value) for key, value in line.items()}
        return json.dumps(cleaned, default=str)

    def _clean(self, value: Any) -> Any:
        finite = isinstance(value, int | None) or (isinstance(value, float) and math.isfinite(value))
        return value if finite else self._redact(str(value))


def setup(level: str = "info", format: str = "human", *, secrets: Iterable[str] = ()) -> None:
    """Send every logger's lines to stderr. Called once, in main."""
    redact = Redact(secrets)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(redact) if format == "json" else HumanFormatter(redact))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in ("httpx", "httpcore", "botocore", "boto3", "urllib3", "watchdog", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def secrets_of(model: BaseModel) -> Iterator[str]:
    """Every secret value in a tree of settings; of a URL, its password."""
    for value in _values(dict(model)):
        text = value.get_secret_value()
        if "://" not in text:
            yield text
        elif match := re.search(r"://[^/\s:@]*:([^/\s@]+)@", text):
            yield match[1]


def _values(data: Mapping[str, Any]) -> Iterator[SecretStr]:
    for value in data.values():
        if isinstance(value, SecretStr):
            yield value
        elif isinstance(value, BaseModel):
            yield from _values(dict(value))
