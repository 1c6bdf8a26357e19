"""What this host is to the registry: its id, its token, its epoch; and calls that do not give up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import tenacity

from weighbridge.hosts.daemon_thread import in_daemon_thread
from weighbridge.hosts.identity import HostFolder, Identity
from weighbridge.registry.client import Client
from weighbridge.registry.errors import Conflict, Forbidden, NotFound, RegistryError, StaleEpoch, Unauthorized
from weighbridge.registry.schemas import Enrolled, Enrolment

log = logging.getLogger(__name__)

T = TypeVar("T")
OpenClient = Callable[[str | None], Client]
"""Opens a client with this token."""
_LONGEST_PAUSE = 10.0


class Fenced(RuntimeError):
    """A newer process runs as this host: this one must end."""


class Refused(RuntimeError):
    """The registry does not let this host in."""


class Membership:
    """`wanted`: what this process says of itself; `once`: the one-time token of the first enrolment."""

    def __init__(self, folder: HostFolder, open_client: OpenClient, wanted: Enrolment, once: str | None) -> None:
        self._folder, self._open, self._wanted = folder, open_client, wanted
        self._identity = folder.identity()
        token = self._identity.token if self._identity else None
        # What is tried when the first one has ended. A host that died while it was let in has used up its one-time
        # token and has none of its own: on the registry's machine this user's registry left one that lets it in.
        self._others: list[str | None] = [] if once is None else [once if token else None]
        self._clients = [open_client(token or once)]
        self._enrolling = asyncio.Lock()
        self.epoch = 0

    @property
    def known(self) -> bool:
        """Whether this host was ever enrolled."""
        return self._identity is not None

    @property
    def id(self) -> str:
        return self._identity.id if self._identity else ""

    @property
    def client(self) -> Client:
        return self._clients[-1]

    def close(self) -> None:
        for client in self._clients:
            client.close()

    async def enrol(self) -> None:
        """Become this host's newest process. Waits for a registry that is away. Raises Refused."""
        await self._patiently(self._enrol)

    async def call(self, ask: Callable[[Client], T]) -> T:
        """Ask until there is an answer; enrol again where the registry does not know this process.

        Raises Fenced when a newer process took over, Refused when the registry does not let this host in.
        """

        async def once() -> T:
            epoch = self.epoch
            try:
                return await in_daemon_thread(partial(ask, self.client))
            except (NotFound, Conflict) as exc:
                if isinstance(exc, StaleEpoch) and epoch == self.epoch:
                    raise Fenced(str(exc)) from exc
                async with self._enrolling:
                    if epoch == self.epoch:  # nobody else has done it meanwhile
                        log.warning("%s: enrolling again", exc)
                        await self._enrol_again(exc)
                raise

        return await self._patiently(once)

    async def _enrol_again(self, because: Exception) -> None:
        """Raises Refused with the first reason too: whose tokens ended with it is told no more than that."""
        try:
            await self._enrol()
        except (Unauthorized, Forbidden) as exc:
            raise self._refused(f"{because}; {exc}") from exc

    async def _enrol(self) -> None:
        try:
            enrolled = await self._ask_to_enrol()
        except Conflict as exc:
            raise Refused(f"{exc} ({self._folder.identity_file} holds it)") from exc
        before = self._identity.token if self._identity else None
        self._identity = Identity(id=enrolled.id, token=enrolled.token or before)
        self.epoch = enrolled.epoch
        if enrolled.token is not None:
            self._clients.append(self._open(enrolled.token))  # calls under way keep the old one
        self._folder.keep_identity(self._identity)
        log.info("enrolled as host %s, epoch %d, at %s", enrolled.id, enrolled.epoch, self.client.url)

    async def _ask_to_enrol(self) -> Enrolled:
        wanted = self._wanted.model_copy(update={"id": self.id})
        try:
            return await in_daemon_thread(partial(self.client.enrol, wanted))
        except Unauthorized as refused:
            if not self._others:
                raise
            self._clients.append(self._open(self._others.pop()))
            try:
                return await in_daemon_thread(partial(self.client.enrol, wanted))
            except Unauthorized:
                raise refused from None

    async def _patiently(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        said = ""

        def say(state: tenacity.RetryCallState) -> None:
            nonlocal said
            error = str(state.outcome.exception()) if state.outcome else ""
            if error != said:
                log.warning("%s; what serves goes on", error)
            said = error

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((RegistryError, OSError))
            & tenacity.retry_if_not_exception_type((Unauthorized, Forbidden)),
            wait=tenacity.wait_random_exponential(0.2, max=_LONGEST_PAUSE),
            before_sleep=say,
            reraise=True,
        )
        try:
            return await retrying(call)
        except (Unauthorized, Forbidden) as exc:
            raise self._refused(str(exc)) from exc

    def _refused(self, why: str) -> Refused:
        named = f" that names host {self.id}" if self.id else ""
        return Refused(
            f"the registry does not let this host in: {why}; create an enrolment token{named} and start again with "
            "host.enrolment_token"
        )
