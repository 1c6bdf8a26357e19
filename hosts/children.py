"""Engine children as the front sees them: start a spare, load it, infer through it, notice when it is gone."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weighbridge.engines.errors import GoldenMismatch
from weighbridge.hosts import frames
from weighbridge.hosts.errors import ChildDied, DeadlineExceeded, GoldenFailed, LoadFailed
from weighbridge.hosts.frames import Frame, Kind
from weighbridge.hosts.settings import HostSettings

INHERITED = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip
"""All of the parent's environment that a child sees: no token, no storage key."""


@dataclass(frozen=True)
class ChildProgram:
    """What an engine child runs, as `module:function`: how it loads, what a spare does before; its own variables."""

    engine: str = "weighbridge.engines.load:load"
    preload: str = "weighbridge.engines.warm:warm"
    environment: Mapping[str, str] = field(default_factory=dict)


class _Link(asyncio.Protocol):
    """The parent's end of the socket pair: matches answers to the futures that wait for them."""

    def __init__(self) -> None:
        self.waiting: dict[int, asyncio.Future[Frame]] = {}
        self.last_answer = 0.0
        self.lost = asyncio.get_running_loop().create_future()
        self._parser = frames.Parser()

    def data_received(self, data: bytes) -> None:
        for frame in self._parser.feed(data):
            future = self.waiting.pop(frame.id, None)
            if future is not None and not future.done():
                future.set_result(frame)
        self.last_answer = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        waiting, self.waiting = self.waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(ChildDied("the engine child ended while it held this request"))
        self.lost.set_result(None)


class Child:
    """One engine child. `died` is called once, with this child, if it ends without having been asked to."""

    def __init__(self, process: subprocess.Popen[bytes], transport: asyncio.WriteTransport, link: _Link) -> None:
        self._process, self._transport, self._link = process, transport, link
        self._next_id = 0
        self._ending = False
        self.died: Callable[[Child], None] | None = None
        link.lost.add_done_callback(self._on_lost)

    @classmethod
    async def start(cls, settings: HostSettings, program: ChildProgram) -> Child:
        """Start a spare and wait until its engine is imported. Raises LoadFailed."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = _spawn(theirs.fileno(), settings, program)
        try:
            transport, link = await asyncio.get_running_loop().create_unix_connection(_Link, sock=ours)
        except BaseException:
            ours.close()
            process.kill()
            process.wait()
            raise
        child = cls(process, transport, link)
        try:
            await child.ask(Kind.PING, {}, timeout=settings.load_seconds)
        except BaseException as exc:
            child.kill()
            await child.end()
            if isinstance(exc, ChildDied | DeadlineExceeded):
                raise LoadFailed(f"an engine child with {program.engine} did not start: {exc}") from exc
            raise
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._link.lost.done() and not self._ending

    @property
    def waiting(self) -> int:
        """Questions that have no answer yet."""
        return len(self._link.waiting)

    def silent_for(self, now: float, since: float) -> float:
        """Seconds without an answer, counted from `since` or the last one (monotonic clock)."""
        return now - max(since, self._link.last_answer)

    def send(self, kind: Kind, meta: dict[str, Any], body: bytes = b"", padding: int = 0) -> asyncio.Future[Frame]:
        """Put one question on the wire; its future ends with the answer or with ChildDied."""
        if not self.alive:
            raise ChildDied("the engine child is gone; the version is being brought up again")
        self._next_id = id = (self._next_id + 1) & 0xFFFFFFFF
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._link.waiting[id] = future
        self._transport.writelines((frames.head(kind, id, meta, len(body), padding), body))
        return future

    async def ask(self, kind: Kind, meta: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """One question and its answer's meta. Raises LoadFailed, ChildDied, DeadlineExceeded."""
        try:
            frame = await asyncio.wait_for(self.send(kind, meta), timeout)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"the engine child gave no answer within {timeout:g} s") from exc
        if frame.kind == Kind.FAILED:
            failure = GoldenFailed if frame.meta["type"] == GoldenMismatch.__name__ else LoadFailed
            raise failure(f"{frame.meta['type']}: {frame.meta['error']}")
        return frame.meta

    async def end(self, grace: float = 2.0) -> None:
        """Ask the child to end; kill it if it does not. What it still held fails with ChildDied."""
        if not self._ending and not self._link.lost.done():
            self._ending = True
            self._transport.write(frames.head(Kind.EXIT, 0, {}))
        try:
            await asyncio.to_thread(self._process.wait, grace)
        except subprocess.TimeoutExpired:
            self.kill()
            await asyncio.to_thread(self._process.wait)
        self._transport.close()

    def kill(self) -> None:
        """End the child now. It counts as a death unless `end` was called before."""
        if self._process.poll() is None:
            self._process.kill()

    def _on_lost(self, _: object) -> None:
        if not self._ending and self.died is not None:
            self.died(self)


def _spawn(fd: int, settings: HostSettings, program: ChildProgram) -> subprocess.Popen[bytes]:
    """Not through the event loop: its fork stops the front for 3 ms, this vfork for 0.4.

    Call it in the loop's own thread: the child dies with the thread that started it.
    """
    command = [sys.executable, "-m", "weighbridge.hosts.child", "--fd", str(fd)]
    command += ["--engine", program.engine, "--body-limit", str(settings.max_body_bytes)]
    command += ["--batch", str(settings.batch), "--preload", program.preload]
    return subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, env=_environment(settings, program))


def _environment(settings: HostSettings, program: ChildProgram) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {"OMP_NUM_THREADS": str(settings.threads), **inherited, **program.environment}


class Spares:
    """Keeps one warm spare: `take` hands it out, `refill` starts the next one in the background."""

    def __init__(self, settings: HostSettings, program: ChildProgram) -> None:
        self._settings, self._program = settings, program
        self._starting: list[asyncio.Task[Child]] = []

    def refill(self) -> None:
        """Start a spare unless one is there or on its way."""
        if not self._starting:
            self._starting.append(asyncio.create_task(Child.start(self._settings, self._program), name="spare"))

    async def take(self) -> Child:
        """A spare that is alive, at once when one is warm. Raises LoadFailed."""
        while True:
            self.refill()
            spare = self._starting.pop()
            try:
                child = await asyncio.shield(spare)
            except asyncio.CancelledError:
                self._starting.append(spare)  # for whoever comes next
                raise
            if child.alive:
                return child
            await child.end()

    async def close(self) -> None:
        """End what was not taken."""
        for spare in self._starting:
            spare.cancel()
        for child in await asyncio.gather(*self._starting, return_exceptions=True):
            if isinstance(child, Child):
                await child.end()
        self._starting.clear()
