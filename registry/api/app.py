"""The app: middleware, routes, handlers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from fastapi import FastAPI

from weighbridge import __version__
from weighbridge.inbound.callers import Callers
from weighbridge.registry.api import (
    auth,
    blobs,
    bodies,
    calls,
    feed,
    front_page,
    health,
    hosts,
    models,
    problems,
    rollouts,
    store,
    templates,
    tokens,
    variants,
    versions,
)
from weighbridge.registry.api.context import Context
from weighbridge.registry.api.forwarding import Forwarding
from weighbridge.registry.api.pulse import Pulse
from weighbridge.registry.db import Database
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy
from weighbridge.registry.schemas import StoreAddress
from weighbridge.registry.settings import RegistrySettings
from weighbridge.storage.blobs import Blobs

_ROOMS = (models, versions, variants, feed, rollouts, hosts, blobs, templates, tokens, store, front_page, health)


def create_app(
    db: Database,
    notifier: Notifier,
    blobs: Blobs,
    settings: RegistrySettings,
    policies: Sequence[Policy] = (),
    address: StoreAddress | None = None,
) -> FastAPI:
    """The registry as an ASGI app. It opens and closes nothing that it is given. `address`: where to publish."""
    pulse = Pulse(db, notifier, settings.poll_seconds)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with pulse.running():
            yield

    app = FastAPI(
        title="Weighbridge",
        version=__version__,
        description=__doc__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    held = bodies.Held(settings.held_bytes)
    going = calls.Calls(settings.calls, settings.waiting_calls)
    app.state.context = Context(db, notifier, blobs, settings, tuple(policies), pulse, held, going, address)
    for room in _ROOMS:
        # Flat, as they are: an included router hides its routes, and `check_routes` must see every one.
        app.router.routes.extend(room.router.routes)
    auth.check_routes(app)
    problems.add_handlers(app)
    callers = Callers.of(settings.host, settings.url, settings.server_names, settings.origins)
    # The last one added is the outermost.
    app.add_middleware(auth.Authentication, db=db, callers=callers, forwarding=Forwarding(settings.trusted_proxies))
    app.add_middleware(problems.LastResort)
    return app
