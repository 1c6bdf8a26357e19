"""Events as lines for people: when (UTC), what, of whom, by whom, why."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from weighbridge import escapes
from weighbridge.cli.output import plain

if TYPE_CHECKING:
    from weighbridge.registry.client import Client
    from weighbridge.registry.schemas import Event

QUIET = ("job.", "recipe.", "tag.", "token.", "model.", "template.learnt", "version.recorded")
"""Starts of kinds that `up` does not print: what they lead to is told by others."""

_LOOK_BACK = 500
"""Events that are looked through for those of this start."""


def line(event: Event) -> str:
    """`    12 2026-11-25 09:30:00Z alias.moved            digits 3 champion, 2 before by ada: hotfix`."""
    what = " ".join(filter(None, (_subject(event), _detail(event))))
    by = f" by {event.actor}" if event.actor else ""
    why = f": {event.reason}" if event.reason else ""
    when = event.created_at.astimezone(UTC)
    return escapes.line(f"{event.seq:>6} {when:%Y-%m-%d %H:%M:%SZ} {event.kind:<22} {what}{by}{why}")


def follow(client: Client, since: datetime, *, json: bool) -> None:
    """Print a line for whatever happens, as long as somebody reads them, beginning with what happened since then.

    Written past Python's buffers: a reader that stands still holds up this thread alone, and nobody's end.
    """
    last = client.status().last_seq
    for event in client.watch(max(0, last - _LOOK_BACK)):
        if event.created_at >= since and is_news(event):
            said = jsonlib.dumps(plain(event), ensure_ascii=False) if json else line(event)
            try:
                os.write(sys.stdout.fileno(), f"{said}\n".encode(errors="replace"))
            except OSError:
                return


def is_news(event: Event) -> bool:
    """Whether a person who watches wants to see it."""
    return not event.kind.startswith(QUIET)


def _subject(event: Event) -> str:
    named = " ".join(str(part) for part in (event.model, event.version) if part is not None)
    return named or str(event.after.get("name") or event.subject)


def _detail(event: Event) -> str:
    """The alias, the variant, the path: what the kind alone does not tell."""
    kind, _, name = event.subject.partition(":")
    match kind:
        case "alias":
            before = event.before.get("number")
            return str(event.after.get("alias", name)) + (f", {before} before" if before is not None else "")
        case "tag":
            return name
        case "variant":
            return str(event.after.get("name", ""))
        case "rollout":
            return event.subject.replace(":", " ")
        case "store":
            return str(event.after.get("store", ""))
    path = event.after.get("path")
    return f"({path})" if path else ""
