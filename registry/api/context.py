"""What every route works with, and the names of its parameters' types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from weighbridge import limits
from weighbridge.registry import schemas
from weighbridge.registry.api.bodies import Held
from weighbridge.registry.api.calls import Calls
from weighbridge.registry.api.pulse import Pulse
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import Invalid, Malformed, NotFound
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy
from weighbridge.registry.settings import RegistrySettings
from weighbridge.storage.blobs import Blobs

_DIGITS = 18
"""A number of more digits counts nothing that is here."""


@dataclass(frozen=True, slots=True)
class Context:
    db: Database
    notifier: Notifier
    blobs: Blobs
    settings: RegistrySettings
    policies: tuple[Policy, ...]
    pulse: Pulse
    held: Held
    calls: Calls
    store: schemas.StoreAddress | None = None
    """Where publishers publish."""

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
    if len(plain) > _DIGITS:
        raise Malformed(f"If-Match {limits.shown_number(plain)} is no revision: no row has so many changes")
    return int(plain)


async def _limit(request: Request, limit: Annotated[int | None, Query(ge=1, le=1000)] = None) -> int:
    settings: RegistrySettings = request.app.state.context.settings
    return limit or settings.page_size


async def _selector(
    selector: Annotated[
        limits.Text, Path(min_length=1, max_length=limits.ALIAS, description="A number, an alias or `latest`.")
    ],
) -> str:
    """A number that no row can have is not there, rather than an error of the database."""
    if selector.isascii() and selector.isdigit() and int(selector) > limits.COUNT:
        raise NotFound("version", selector)
    return selector


Ctx = Annotated[Context, Depends(_context)]
Revision = Annotated[int | None, Depends(_revision)]
Limit = Annotated[int, Depends(_limit)]
Cursor = Annotated[limits.Text, Query(max_length=limits.NAME, description="`next` of the page before.")]
NumberCursor = Annotated[int | None, Query(ge=0, le=limits.BYTES, description="`next` of the page before.")]
Name = Annotated[limits.Text, Path(min_length=1, max_length=limits.NAME)]
ModelName = Annotated[schemas.ModelName, Path(min_length=1)]
ModelFilter = Annotated[schemas.ModelName | None, Query()]
Selector = Annotated[str, Depends(_selector)]
Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]
RowId = Annotated[int, Path(ge=1, le=limits.COUNT)]
Wait = Annotated[float, Query(ge=0, le=60, description="Longest wait for news (s).")]
