"""What every route works with, and the names of its parameters' types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from weighbridge.registry.api.pulse import Pulse
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import Invalid, NotFound
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy
from weighbridge.registry.settings import RegistrySettings
from weighbridge.storage.blobs import Blobs

_MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Context:
    db: Database
    notifier: Notifier
    blobs: Blobs
    settings: RegistrySettings
    policies: tuple[Policy, ...]
    pulse: Pulse

    @contextlib.contextmanager
    def change(self, *topics: str) -> Iterator[Session]:
        """A write transaction; what it may have changed is rung after the commit."""
        with self.db.transaction() as tx:
            yield tx
        for topic in ("events", *topics):
            self.notifier.ring(topic)


# Dependencies are coroutines: a plain function would cost a hop to a thread each.


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def _revision(if_match: Annotated[str | None, Header()] = None) -> int | None:
    """If-Match as the revision that it names; `*` and its absence demand nothing."""
    if if_match is None or if_match.strip() == "*":
        return None
    plain = if_match.strip().removeprefix("W/").strip('"')
    if not plain.isascii() or not plain.isdigit():
        raise Invalid(f'If-Match {if_match[:40]!r} is no revision: send the row\'s, such as "3"')
    return int(plain)


async def _limit(request: Request, limit: Annotated[int | None, Query(ge=1, le=1000)] = None) -> int:
    settings: RegistrySettings = request.app.state.context.settings
    return limit or settings.page_size


async def _selector(
    selector: Annotated[str, Path(min_length=1, max_length=255, description="A number, an alias or `latest`.")],
) -> str:
    """A number that no row can have is not there, rather than an error of the database."""
    if selector.isascii() and selector.isdigit() and int(selector) > _MAX_INT:
        raise NotFound("version", selector)
    return selector


Ctx = Annotated[Context, Depends(_context)]
Revision = Annotated[int | None, Depends(_revision)]
Limit = Annotated[int, Depends(_limit)]
Cursor = Annotated[str, Query(max_length=255, description="`next` of the page before.")]
NumberCursor = Annotated[int | None, Query(ge=0, le=2**63 - 1, description="`next` of the page before.")]
Name = Annotated[str, Path(min_length=1, max_length=255)]
Selector = Annotated[str, Depends(_selector)]
Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]
RowId = Annotated[int, Path(ge=1, le=_MAX_INT)]
Wait = Annotated[float, Query(ge=0, le=60, description="Longest wait for news (s).")]
