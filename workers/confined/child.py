"""A confined child: hears one task, runs its stage, says its outcome, and ends. All else it asks its worker for.

It says {"pid"} first; {"ask": verb, …}, which is answered; {"progress"}; {"phase"}; and last {"outcome"} or
{"raised": words, "memory": bool, "ours": bool}.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import resource
import select
import socket
import threading
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.engines.warm import warm as warm_engine
from weighbridge.storage.blobs import Blob
from weighbridge.storage.protocols import Ref
from weighbridge.storage.safetensors_header import Header
from weighbridge.workers.confined import wire
from weighbridge.workers.confined.order import Order
from weighbridge.workers.confined.work import perform
from weighbridge.workers.desk import Phase
from weighbridge.workers.ours import is_ours
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.taking import Taken

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

logger = logging.getLogger(__name__)

_READ = 1 << 20
"""Bytes that a stream asks for at once."""


def warm() -> None:
    """What the nursery does before the first fork; on one thread, so that a fork may follow."""
    import torch

    torch.set_num_threads(1)
    warm_engine()


def serve(fd: int) -> NoReturn:
    """Be a child on this socket."""
    try:
        with socket.socket(fileno=fd) as sock:
            _serve(sock)
    except (OSError, EOFError):
        pass  # nobody hears it any more
    finally:
        os._exit(0)  # nothing to save: skip the interpreter's slow end


def _serve(sock: socket.socket) -> None:
    threading.Thread(target=_end_with_worker, args=(sock.fileno(),), name="watch", daemon=True).start()
    wire.say(sock, {"pid": os.getpid()})
    order, _ = wire.hear(sock)
    _settle(order)
    try:
        outcome = perform(order.task, _AskingDesk(sock, order.scratch))
        said = _written(outcome)
    except Exception as exc:
        _unlimited()
        memory = isinstance(exc, MemoryError)
        if not memory:
            logger.exception("the stage failed")
        said = {"raised": f"{type(exc).__name__}: {exc}".rstrip(": "), "memory": memory, "ours": is_ours(exc)}
    wire.say(sock, said)


def _settle(order: Order) -> None:
    """Take the limits that hold while it reads: the kernel's, so that nothing can starve them.

    What it reads has no cycles, and is kept: looking for some again and again took half of the time of a large header.
    """
    gc.disable()
    import torch

    torch.set_num_threads(order.threads)
    os.nice(order.niceness)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + order.cpu_seconds) + 1)
    _limit(resource.RLIMIT_DATA, _data_bytes() + order.memory_bytes)


def _limit(what: int, soft: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _unlimited() -> None:
    for what in (resource.RLIMIT_CPU, resource.RLIMIT_DATA):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (hard, hard))


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) << 10


def _end_with_worker(fd: int) -> None:
    """End when the worker is gone, also in the middle of a computation."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    poll.poll()
    os._exit(1)


def _written(outcome: Outcome) -> dict[str, Any]:
    rows = {
        "gates": [gate.model_dump(mode="json") for gate in outcome.gates],
        "metrics": [metric.model_dump(mode="json") for metric in outcome.metrics],
    }
    return {"outcome": {"verdict": outcome.verdict, "reason": outcome.reason, "facts": dict(outcome.facts), **rows}}


class _AskingDesk:
    """The desk of a child: every question goes to the worker. What the worker cannot cure ends the child there."""

    def __init__(self, sock: socket.socket, scratch: Path) -> None:
        self._sock, self._scratch = sock, scratch

    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        _, body = self._ask("get", ref=asdict(_pinned(key, if_match)), start=start, end=end)
        return body

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        ref = _pinned(key, if_match)
        return cast("IO[bytes]", io.BufferedReader(_Ranges(self, ref, start, ref.size if end is None else end), _READ))

    def take(self, name: str, ref: Ref, header: Header | None) -> Taken:
        layout = None if header is None else _layout(header)
        (file, columns), _ = self._ask("take", name=name, ref=asdict(ref), layout=layout)
        return Taken(file, [] if header is None else _stats(header, columns))

    def digest(self, refs: Iterable[Ref]) -> str:
        return str(self._ask("digest", refs=[asdict(ref) for ref in refs])[0])

    def path(self, digest: str) -> Path:
        return cast("Path", self._ask("path", digest=digest)[0])

    def put_bytes(self, data: bytes) -> Blob:
        return cast("Blob", self._ask("put_bytes", data)[0])

    def put_file(self, path: Path) -> Blob:
        return cast("Blob", self._ask("put_file", path=str(path))[0])

    @property
    def scratch(self) -> Path:
        return self._scratch

    def progress(self, share: float) -> None:
        wire.say(self._sock, {"progress": share})

    def enter(self, phase: Phase) -> None:
        if phase is Phase.RUNNING:
            _unlimited()
            gc.freeze()
            gc.enable()
        wire.say(self._sock, {"phase": phase})

    def _ask(self, verb: str, body: bytes = b"", **more: Any) -> tuple[Any, bytes]:
        wire.say(self._sock, {"ask": verb, **more}, body)
        answer, data = wire.hear(self._sock)
        if isinstance(answer, Exception):
            raise answer
        return answer, data


def _layout(header: Header) -> dict[str, Any]:
    """A list for each field, as `verbs` reads them: quicker than a row for each tensor."""
    rows = header.tensors.values()
    return {
        "length": header.length,
        "names": list(header.tensors),
        "dtypes": [one.dtype for one in rows],
        "ranks": [len(one.shape) for one in rows],
        "sizes": [size for one in rows for size in one.shape],
        "starts": [one.start for one in rows],
        "ends": [one.end for one in rows],
    }


def _stats(header: Header, learnt: list[list[Any]]) -> list[TensorStats]:
    names, rows = zip(*header.in_file_order, strict=True) if header.tensors else ((), ())
    dtypes, shapes = (one.dtype for one in rows), (one.shape for one in rows)
    return list(map(TensorStats, names, dtypes, shapes, (one.end - one.start for one in rows), *learnt))


def _pinned(key: str, ref: Ref | None) -> Ref:
    if ref is None or ref.key != key:
        raise ValueError(f"{key}: a confined stage reads pinned files only")
    return ref


class _Ranges(io.RawIOBase):
    """A pinned object's bytes [start, end), a range at a time."""

    def __init__(self, desk: _AskingDesk, ref: Ref, start: int, end: int) -> None:
        self._desk, self._ref, self._at, self._end = desk, ref, start, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._end, self._at + len(view))
        if end <= self._at:
            return 0
        data = self._desk.get(self._ref.key, start=self._at, end=end, if_match=self._ref)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
