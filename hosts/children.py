"""Engine children as the front sees them: start a spare, load it, infer through it, notice when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weighbridge.engines.errors import GoldenMismatch
from weighbridge.hosts import frames
from weighbridge.hosts.activity import Activity
from weighbridge.hosts.child import EXPLAIN
from weighbridge.hosts.errors import (
    Blocked,
    ChildDied,
    ClientLeft,
    Crashed,
    DeadlineExceeded,
    GoldenFailed,
    HostError,
    Hung,
    LoadFailed,
    Overlong,
)
from weighbridge.hosts.frames import Kind
from weighbridge.hosts.line import Asked, Lane, Line, Question
from weighbridge.hosts.nursery import PID_BYTES
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


_SENT_AHEAD = 6
"""Requests that a child has beside those of two batches: enough that it never waits for the front."""


class _Link(asyncio.Protocol):
    """The parent's end of the socket pair: matches answers to the futures that wait for them.

    `room_in` hears of a lane from which the child has answered a request.
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        self.room_in: Callable[[Lane], None] = lambda lane: None
        self.waiting: dict[int, Asked] = {}
        """What was sent and has no answer yet, oldest first."""
        self.last_sign = 0.0
        self.cause: HostError | None = None
        """What the oldest question is told when the child ends, where that is known beforehand."""
        self.lost = asyncio.get_running_loop().create_future()
        self._parser = frames.Parser()

    def data_received(self, data: bytes) -> None:
        for frame in self._parser.feed(data):
            asked = self.waiting.pop(frame.id, None) if frame.kind != Kind.PROGRESS else None
            if asked is None:
                continue
            if not asked.future.done():
                asked.future.set_result(frame)
            if asked.lane is not None:
                asked.lane.sent -= 1
                self.room_in(asked.lane)
        self.last_sign = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        waiting, self.waiting = self.waiting, {}
        error: HostError = self.cause or Crashed("the engine child ended while it computed this request")  # most likely
        for asked in (*waiting.values(), *self.line.everybody()):
            if not asked.future.done():
                asked.future.set_exception(error)
            error = ChildDied("the engine child ended for another request; this one may be sent again")
        self.lost.set_result(None)


class Child:
    """One engine child. `died` is called once, with this child, if it ends without having been asked to."""

    def __init__(self, process: Forked, transport: asyncio.WriteTransport, link: _Link, idle_limit: float) -> None:
        self._process, self._transport, self._link, self._idle_limit = process, transport, link, idle_limit
        self._next_id = 0
        self._ending = False
        self._activity = Activity(process.pid, time.monotonic())
        link.room_in = self._advance
        self.died: Callable[[Child], None] | None = None
        link.lost.add_done_callback(self._on_lost)

    @classmethod
    async def start(cls, nursery: Nursery) -> Child:
        """Fork a spare and wait until it answers. Raises LoadFailed."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await nursery.fork(theirs)
            transport, link = await asyncio.get_running_loop().create_unix_connection(
                lambda: _Link(Line(nursery.ahead)), sock=ours
            )
        except BaseException:
            ours.close()  # which ends the child, if there is one
            raise
        child = cls(process, transport, link, nursery.idle_limit)
        try:
            await child.ask(Kind.PING, {}, timeout=nursery.patience)
        except BaseException as exc:
            child.kill()
            await child.end()
            if isinstance(exc, ChildDied | DeadlineExceeded):
                raise LoadFailed(f"an engine child did not start: {exc}") from exc
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
        """Questions that have no answer yet, with the child or in the line before it."""
        return len(self._link.waiting) + self._link.line.waiting

    def silent_for(self, now: float) -> float:
        """Seconds that it has had a question without a sign of life (monotonic clock); 0 while it has none."""
        oldest = next(iter(self._link.waiting.values()), None)
        return 0.0 if oldest is None else now - max(oldest.sent, self._link.last_sign)

    def at_work(self) -> bool:
        """Whether it computed or read since this was asked last, which is at most a second ago (Swapper)."""
        return not self._activity.idle_for(time.monotonic())

    def held_up(self, asked: Asked) -> DeadlineExceeded:
        """Why there is no answer to `asked` in time: is the child slow, hung on it, or hung on the one before?"""
        if self._link.last_sign > asked.sent:
            return DeadlineExceeded("no answer before the deadline")
        if next(iter(self._link.waiting.values()), None) is not asked:
            return Blocked("no answer before the deadline: the request before it did not end")
        if self.at_work():
            return Overlong("no answer before the deadline: it was still being computed")
        return Hung("no answer, and no sign of life, before the deadline")

    def expire(self, asked: Asked) -> None:
        """Its time is up."""
        self._link.line.leave(asked)
        if not asked.future.done():
            asked.future.set_exception(self.held_up(asked))

    def drop(self, asked: Asked) -> None:
        """Nobody waits for it any more. What the child has is answered all the same: it tells of the version."""
        if self._link.line.leave(asked) and not asked.future.done():
            asked.future.set_exception(ClientLeft("the client left before its request was begun"))

    def infer(self, meta: dict[str, Any], body: bytes | bytearray, padding: int) -> Asked:
        """Put one inference request into the line; its future ends with the answer or with ChildDied.

        What cannot be framed raises, and leaves nothing behind.
        """
        self._demand_alive()
        id, lane = self._new_id(), self._link.line.lane(len(body))
        head = frames.head(Kind.INFER, id, meta, len(body), padding)
        asked = Asked(time.monotonic(), asyncio.get_running_loop().create_future(), lane)
        lane.waiting.append(Question(asked, id, head, body))
        self._advance(lane)
        return asked

    def _advance(self, lane: Lane) -> None:
        while self.alive and (question := self._link.line.next(lane)) is not None:
            self._transport.writelines((question.head, question.body))
            self._link.waiting[question.id] = question.asked

    def send(self, kind: Kind, meta: dict[str, Any]) -> Asked:
        """Put one question on the wire; its future ends with the answer or with ChildDied."""
        self._demand_alive()
        id = self._new_id()
        self._transport.write(frames.head(kind, id, meta))
        asked = self._link.waiting[id] = Asked(time.monotonic(), asyncio.get_running_loop().create_future())
        return asked

    def _new_id(self) -> int:
        self._next_id = (self._next_id + 1) & 0xFFFFFFFF
        return self._next_id

    def _demand_alive(self) -> None:
        if not self.alive:
            raise ChildDied("the engine child is gone; the version is being brought up again")

    async def ask(self, kind: Kind, meta: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """One question and its answer's meta. Raises LoadFailed, ChildDied, DeadlineExceeded.

        A child that neither computes nor reads is not waited for to the end: it is stuck, and another may not be.
        """
        answer, until = self.send(kind, meta).future, time.monotonic() + timeout
        activity = Activity(self.pid, time.monotonic())
        try:
            while not answer.done():
                left = until - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"the engine child gave no answer within {timeout:g} s")
                await asyncio.wait((answer,), timeout=min(left, self._idle_limit / 4, 1.0))
                if not answer.done() and (idle := activity.idle_for(time.monotonic())) >= self._idle_limit:
                    await self.explain()
                    raise DeadlineExceeded(f"the engine child neither computed nor read anything for {idle:.1f} s")
        finally:
            answer.cancel()  # of no more interest, where it is not done
        frame = answer.result()
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
        self._process.kill()

    async def explain(self) -> None:
        """Have the child write to the log where its threads are; it has a moment for it, as it is about to be ended."""
        self._process.send(EXPLAIN)
        await asyncio.wait((self._link.lost,), timeout=0.1)

    async def replace(self, silent: float) -> None:
        """End a child that hangs, or computes without an end: what it held first is the reason, and is told so."""
        self._link.cause = (
            Overlong(f"this request was computed for {silent:.1f} s, and the engine child was ended")
            if self.at_work()
            else Hung(f"the engine child gave no sign of life for {silent:.1f} s and was ended")
        )
        await self.explain()
        self.kill()

    def _on_lost(self, _: object) -> None:
        if not self._ending and self.died is not None:
            self.died(self)


class Forked:
    """A process that is another's child. Held by a pidfd, so that its id can never come to mean another process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it has ended. Raises subprocess.TimeoutExpired."""
        if not select.select([self._fd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)

    def kill(self) -> None:
        """Kill it; one that has ended is no error."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; one that has ended is no error."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._fd)


class Nursery:
    """The process that has imported everything and forks children. Started at the first need, again if it died.

    Its children outlive it. Use it in the loop's own thread: it dies with the thread that started it.
    """

    def __init__(self, settings: HostSettings, program: ChildProgram) -> None:
        self._settings, self._program = settings, program
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None
        self._lock = asyncio.Lock()

    @property
    def patience(self) -> float:
        """Seconds that starting a child may take."""
        return self._settings.load_seconds

    @property
    def idle_limit(self) -> float:
        """Seconds that a child that was asked may do nothing at all."""
        return self._settings.hang_seconds

    @property
    def ahead(self) -> int:
        """Requests that a child may have at once."""
        return _SENT_AHEAD + 2 * self._settings.batch

    async def fork(self, theirs: socket.socket) -> Forked:
        """Make a child that owns a copy of this end of a socket pair. Raises LoadFailed."""
        async with self._lock:
            for _ in range(2):  # the first order may find a nursery that was killed
                self._ensure()
                try:
                    answer = await asyncio.to_thread(self._order, theirs)
                except asyncio.CancelledError:
                    self._end()  # its answer would be taken for the next order's
                    raise
                if len(answer) == PID_BYTES:
                    with contextlib.suppress(ProcessLookupError):
                        return Forked(int.from_bytes(answer, "little"))
                self._end()
        raise LoadFailed(f"an engine child with {self._program.engine} did not start: see the host's log")

    async def close(self) -> None:
        async with self._lock:
            self._end()

    def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = self._spawn(theirs.fileno())
        ours.settimeout(self.patience)
        self._orders = ours

    def _order(self, theirs: socket.socket) -> bytes:
        """The answer, shorter than a process id when the nursery is gone or hangs."""
        assert self._orders is not None
        try:
            socket.send_fds(self._orders, [b"f"], [theirs.fileno()])
            return self._orders.recv(PID_BYTES)
        except OSError:
            return b""

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._orders is not None:
            self._orders.close()
        self._process = self._orders = None

    def _spawn(self, fd: int) -> subprocess.Popen[bytes]:
        """Not through the event loop: its fork stops the front for 3 ms, this vfork for 0.4."""
        program, settings = self._program, self._settings
        command = [sys.executable, "-m", "weighbridge.hosts.nursery", "--fd", str(fd), "--engine", program.engine]
        command += ["--body-limit", str(settings.max_body_bytes), "--batch", str(settings.batch)]
        command += ["--preload", program.preload]
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment = {"OMP_NUM_THREADS": str(settings.threads), **inherited, **program.environment}
        return subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, env=environment)


class Spares:
    """Keeps one warm spare: `take` hands it out, `refill` starts the next one in the background."""

    def __init__(self, settings: HostSettings, program: ChildProgram) -> None:
        self._nursery = Nursery(settings, program)
        self._starting: list[asyncio.Task[Child]] = []

    def refill(self) -> None:
        """Start a spare unless one is there or on its way."""
        if not self._starting:
            self._starting.append(asyncio.create_task(Child.start(self._nursery), name="spare"))

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
        await self._nursery.close()
