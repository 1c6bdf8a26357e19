"""The worker's side of a confined child: order one, answer it, watch it, and say how it ended."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from weighbridge.storage.errors import DigestMismatch, ObjectNotFound, PreconditionFailed
from weighbridge.workers.confined import wire
from weighbridge.workers.confined.order import Limits, Order
from weighbridge.workers.confined.verbs import VERBS, read_outcome
from weighbridge.workers.desk import Desk, Forbidden, Phase
from weighbridge.workers.ours import ChildDied, ChildFailed, OwnFailure, TooLong
from weighbridge.workers.outcome import Outcome

_LOOK = 0.2
"""Seconds between two looks at a child that says nothing."""
_START = 60.0
"""Seconds that a fork may take; the first one waits until the nursery has imported everything."""
_DEAF = 60.0
"""Seconds that a child may not read what it asked for."""
_LAST_WORD = 5.0
_OTHERS = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGBUS})
"""What ends a child for reasons that are ours: the kernel short of memory, an operator, a disk that lost its pages."""
_TICK = os.sysconf("SC_CLK_TCK")


class Exceeded(Exception):
    """What a child read took more than a limit, or ended it: the checkpoint's own doing."""


@dataclass(frozen=True)
class Confine:
    """Runs stages in children of the nursery behind `orders`."""

    orders: socket.socket
    limits: Limits
    threads: int = 1
    measured: Callable[[int, float], None] = lambda *_: None
    """Told the most bytes of memory that a child had, and its seconds of a processor, when it has ended."""

    def perform(
        self,
        task: object,
        desk: Desk,
        beat: Callable[[], None],
        niceness: int = 0,
        seconds: float | None = None,
    ) -> Outcome:
        """Run the task's stage in a child; `beat` is called again and again, and what it raises ends the child.

        Raises Exceeded, TooLong, ChildFailed, OwnFailure, and what `desk` raises, but for PreconditionFailed and
        ObjectNotFound, which the stage is told.
        """
        limits = replace(self.limits, seconds=min(self.limits.seconds, seconds or self.limits.seconds))
        order = Order(task, self.limits.cpu_seconds, self.limits.memory_bytes, self.threads, niceness, desk.scratch)
        with _Child(self.orders, limits, desk, beat) as child:
            try:
                return child.run(order)
            finally:
                if (end := child.end()) is not None:
                    self.measured(end["bytes"], end["seconds"])


class _Child:
    def __init__(self, orders: socket.socket, limits: Limits, desk: Desk, beat: Callable[[], None]) -> None:
        self._limits, self._desk, self._beat = limits, desk, beat
        self._phase, self._pid, self._pidfd = Phase.READING, 0, -1
        self._until = time.monotonic() + limits.seconds
        self._listener = wire.Listener()
        self._end: dict[str, Any] | None = None
        self._sock, theirs = socket.socketpair()
        self._ended, tell = os.pipe()
        try:
            self._sock.settimeout(_DEAF)
            socket.send_fds(orders, [b"child"], [theirs.fileno(), tell])
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            os.close(tell)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def end(self) -> dict[str, Any] | None:
        """Kill it where it still runs, and wait until it is gone; how it ended, None where nobody knows."""
        self._kill()
        return self._how()

    def run(self, order: Order) -> Outcome:
        starting, looked = time.monotonic() + _START, 0.0
        while True:
            heard = _readable(self._sock.fileno(), _LOOK)
            if time.monotonic() - looked >= _LOOK:  # also at one that never stops talking
                looked = time.monotonic()
                self._beat()
                self._watch(starting)
            if not heard:
                continue
            try:
                for said in self._listener.feed(wire.receive(self._sock)):
                    if (outcome := self._heard(said, order)) is not None:
                        return outcome
            except EOFError:
                self._died()

    def _heard(self, said: wire.Said, order: Order) -> Outcome | None:
        match said.head:
            case {"pid": int(pid)} if not self._pid:
                self._pid, self._pidfd = pid, os.pidfd_open(pid)
                wire.tell(self._sock, order)
            case {"ask": str(verb)}:
                self._answer(verb, said)
            case {"progress": int(share) | float(share)}:
                self._desk.progress(share)
            case {"phase": phase}:
                self._phase = Phase(phase)
            case {"outcome": dict(outcome)}:
                return read_outcome(outcome)
            case {"raised": str(words), "memory": True} if self._phase is Phase.READING:
                raise Exceeded(f"reading it takes more than {self._limits.memory_bytes:,} bytes of memory ({words})")
            case {"raised": str(words), "ours": True}:
                raise OwnFailure(words)
            case {"raised": str(words)}:
                raise ChildFailed(words)
            case _:
                raise wire.BadFrame(str(said.head)[:200])
        return None

    def _answer(self, verb: str, said: wire.Said) -> None:
        try:
            value, body = VERBS[verb](self._desk, said)
        except (PreconditionFailed, ObjectNotFound) as exc:
            value, body = type(exc)(str(exc), key=exc.key), b""
        except DigestMismatch as exc:
            value, body = exc, b""
        except Forbidden as exc:
            raise ChildFailed(str(exc)) from exc
        wire.tell(self._sock, value, body)

    def _watch(self, starting: float) -> None:
        """Raise Exceeded, TooLong or OwnFailure where a limit is passed. A silent child computes, or waits its turn."""
        now = time.monotonic()
        if not self._pid:
            if now > starting:
                raise OwnFailure(f"no child came within {_START:g} s: see the worker's log")
            return
        if now > self._until:
            raise TooLong(f"it did not end within {self._limits.seconds:g} s")
        used = _used(self._pid)
        if used is None:
            return
        seconds, size = used
        if self._phase is Phase.READING and seconds > self._limits.cpu_seconds:
            raise Exceeded(self._too_long)
        if size > self._limits.most_bytes:
            raise OwnFailure(f"it takes {size:,} bytes of memory, this worker gives {self._limits.most_bytes:,}")

    def _died(self) -> NoReturn:
        """By itself, or by another's hand; whose doing it was tells the phase and the signal."""
        end = self._how()
        if end is None:
            raise ChildDied("its child ended, and nobody knows how: the process that starts children is gone")
        status: int = end["status"]
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = f"signal {signal.Signals(number).name}" if number else f"exit code {os.WEXITSTATUS(status)}"
        if self._phase is Phase.READING and number == signal.SIGXCPU:
            raise Exceeded(self._too_long)
        if self._phase is Phase.READING and number not in _OTHERS:
            raise Exceeded(f"reading it ended a process by {how}")
        hint = "; the kernel ends what uses too much memory this way" if number == signal.SIGKILL else ""
        raise ChildDied(f"its child was ended by {how}{hint}")

    @property
    def _too_long(self) -> str:
        return f"reading it takes more than {self._limits.cpu_seconds:g} s of a processor"

    def _how(self) -> dict[str, Any] | None:
        if self._end is None and self._pid and _readable(self._ended, _LAST_WORD):
            told = os.read(self._ended, 4096)
            self._end = json.loads(told) if told else None
        return self._end

    def _kill(self) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _close(self) -> None:
        self._sock.close()
        os.close(self._ended)
        if self._pidfd >= 0:
            os.close(self._pidfd)


def _readable(descriptor: int, seconds: float) -> bool:
    """By poll: select knows no descriptor beyond 1,023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _used(pid: int) -> tuple[float, int] | None:
    """Processor seconds and resident bytes of a process; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICK, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
