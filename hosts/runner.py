"""What an engine child does with frames: load, prove, infer. One session, one block of a request at a time."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from weighbridge.engines import golden, tensors
from weighbridge.engines.blobs import read
from weighbridge.engines.errors import EngineError, InvalidInput
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import Array, Arrays, Session
from weighbridge.hosts import batching, blame, codec, costs, frames, meter
from weighbridge.hosts.background import Background
from weighbridge.hosts.errors import DeadlineExceeded, HostError, NotReady, ProgramFailed, TooCostly
from weighbridge.hosts.frames import Frame, Kind
from weighbridge.hosts.large_json import LARGE
from weighbridge.hosts.turns import Answer, Turns, Work
from weighbridge.hosts.witness import Witness
from weighbridge.storage.local_cache import BlobCache

log = logging.getLogger(__name__)

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that yields where others may have their turn."""
_LARGEST_ANSWER = 16
"""Times the largest body: the front holds an answer whole."""
_LIMIT = 2
"""Times the budget of one request: what a child may take beyond what it holds when it is loaded."""


class Runner:
    """Answers frames. `load` is an engine's: load(manifest, blobs, *, device, factories) → Session.

    Slow work that nobody waits for in a live request runs in `background`.
    """

    def __init__(
        self, load: Callable[..., Session], background: Background, *, body_limit: int, batch: int = 1
    ) -> None:
        self._load, self._background, self._body_limit, self._batch = load, background, body_limit, batch
        self._session: Session | None = None
        self._golden = (b"", (0.0, 0.0, 0.0))
        self._model = self._version = ""
        self._budget, self._costs, self._meter = 0, costs.Costs(), meter.Meter()
        self._witness: Witness | None = None
        self._promised = 0
        """Bytes that the requests hold that are computed in blocks."""

    def serve(self, sock: socket.socket) -> None:
        """Answer until the parent asks for the end or goes away; large requests step by step, between the others."""
        turns = Turns(partial(_write, sock), lambda: frames.readable(sock))
        while True:
            if turns.due():
                turns.step()
                continue
            frame = frames.read(sock)
            if frame is None or frame.kind == Kind.EXIT:
                return
            if frame.kind != Kind.INFER:
                _write(sock, frame, self._answer(frame))
                continue
            asked, after = self._waiting(sock, frame)
            self._begin(sock, asked, turns)
            if after is not None and after.kind == Kind.EXIT:
                return
            if after is not None:
                _write(sock, after, self._answer(after))

    def _begin(self, sock: socket.socket, asked: list[Frame], turns: Turns) -> None:
        """Answer what is small at once, several together where that is allowed; let the others take turns."""
        small = [frame for frame in asked if len(frame.body) < LARGE]
        if len(small) > 1 and self._session is not None:
            for frame, answer in zip(small, self._infer(self._session, small), strict=True):
                _write(sock, frame, answer)
            asked = [frame for frame in asked if frame not in small]
        for frame in asked:
            turns.begin(frame, self._guarded(self._one(frame)))

    def _waiting(self, sock: socket.socket, first: Frame) -> tuple[list[Frame], Frame | None]:
        """The requests that are there already, and what came after them that is none."""
        asked = [first]
        while len(asked) < self._batch and frames.readable(sock) and (frame := frames.read(sock)) is not None:
            if frame.kind != Kind.INFER:
                return asked, frame
            asked.append(frame)
        return asked, None

    def _answer(self, frame: Frame) -> Answer:
        try:
            return Kind.REPLY, self._verb(frame), []
        except MemoryError:
            raise
        except Exception as exc:  # a bad artifact must not end the child without a reason
            return Kind.FAILED, {"error": str(exc) or repr(exc), "type": type(exc).__name__}, []

    def _verb(self, frame: Frame) -> dict[str, Any]:
        if frame.kind == Kind.LOAD:
            return self._bring_up(**frame.meta)
        if frame.kind == Kind.GOLDEN:
            return self._check_golden(**frame.meta)
        return {"rss": resident_bytes()}  # STATS and PING

    def _bring_up(
        self,
        *,
        model: str,
        version: str,
        manifest: str,
        blobs: str,
        device: str,
        threads: int,
        factories: list[str],
        memory: int = 0,
    ) -> dict[str, Any]:
        began = time.monotonic()
        parsed = Manifest.model_validate_json(manifest)
        paths = BlobCache(Path(blobs)).path

        def load() -> Session:
            set_threads(threads)
            return self._load(parsed, paths, device=device, factories=factories)

        self._session = self._background.run(load)
        self._golden = read(paths, parsed.golden.digest, "the reference golden"), parsed.golden.tolerance
        self._model, self._version = model, version
        self._meter = meter.Meter(device)
        self._budget = self._meter.room(memory)
        set_threads(threads)  # OpenMP counts threads per calling thread; this one will infer
        return {"seconds": time.monotonic() - began, "rss": resident_bytes()}

    def _check_golden(self, *, rounds: int) -> dict[str, Any]:
        """Prove the reference golden and measure what a request takes, in the background; then answer the golden's
        inputs `rounds` times as requests. From then on memory is limited."""
        session, (data, tolerance) = self._loaded(), self._golden
        began = time.monotonic()
        inputs, expected = golden.read(data)

        def prove() -> costs.Costs:
            golden.check(session, data, *tolerance)
            return costs.measure(session, inputs, self._budget, self._meter)

        self._costs = self._background.run(prove)
        self._witness = Witness(session, data, tolerance)
        for _ in range(rounds):
            golden.compare(self._warm_up(inputs), expected, *tolerance)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection in the middle of a request walks over it
        if self._budget and not self._meter.on_device:
            meter.limit(_LIMIT * self._budget)
        return {"seconds": time.monotonic() - began}

    def _warm_up(self, inputs: Arrays) -> dict[str, Array]:
        """The whole path of a request, in the thread that will answer: caches are per thread, imports are lazy."""
        body = codec.encode_request(inputs)
        request = codec.decode(bytearray(b"".join(body.parts)), body.header_length)
        outputs = self._loaded().infer(request.inputs)
        codec.encode(self._model, self._version, codec.InferRequest({}, binary_output=True), outputs)
        return outputs

    def _infer(self, session: Session, asked: list[Frame]) -> list[Answer]:
        """One answer for each, in order. A batch that fails is computed one by one: each has its own fault or none."""
        answers: dict[int, Answer] = {}
        decoded: dict[int, codec.InferRequest] = {}
        for index, frame in enumerate(asked):
            try:
                decoded[index] = codec.finished(self._decoded(frame))
            except Exception as exc:
                answers[index] = self._fault(exc)
        order = list(decoded)
        single = [[number] for number in range(len(order))]
        inputs = [decoded[index].inputs for index in order]
        for members in batching.groups(inputs, self._batch) if batching.batchable(session) else single:
            answers |= self._predict_together(session, {order[member]: decoded[order[member]] for member in members})
        return [answers[index] for index in range(len(asked))]

    def _predict_together(self, session: Session, requests: dict[int, codec.InferRequest]) -> dict[int, Answer]:
        if len(requests) > 1:
            try:
                outputs = batching.infer(session, [request.inputs for request in requests.values()])
            except Exception as exc:
                log.debug("a batch of %d failed, computing one by one: %s", len(requests), exc)
            else:
                return {
                    index: codec.finished(self._guarded(self._encoded(request, its)))
                    for (index, request), its in zip(requests.items(), outputs, strict=True)
                }
        return {index: codec.finished(self._guarded(self._predicted(it))) for index, it in requests.items()}

    def _one(self, frame: Frame) -> Steps[codec.Encoded]:
        request = yield from self._decoded(frame)
        return (yield from self._predicted(request))

    def _decoded(self, frame: Frame) -> Steps[codec.InferRequest]:
        meta, body = frame.meta, frame.body
        if time.monotonic() > meta["deadline"]:
            raise DeadlineExceeded("the deadline passed while the request waited for the engine")
        return (yield from codec.decoding(body, meta.get("header")))

    def _predicted(self, request: codec.InferRequest) -> Steps[codec.Encoded]:
        session = self._loaded()
        if self._costs.small(request.inputs):
            return (yield from self._encoded(request, session.infer(request.inputs)))
        units, elements = self._costs.units(request.inputs)
        if units <= self._costs.at_once(elements):
            return (yield from self._encoded(request, self._whole(session, request.inputs, units, elements)))
        tensors.check_inputs(request.inputs, session.inputs)
        given = sum(array.nbytes for array in request.inputs.values())
        need = self._costs.demand(units, elements, given, json=not request.binary_output)
        while self._promised and self._budget and self._promised + need > self._budget:
            yield  # until another large request has ended
        self._promised += need
        try:
            outputs = yield from self._in_blocks(session, request.inputs, units, elements)
            return (yield from self._encoded(request, outputs))
        finally:
            self._promised -= need

    def _whole(self, session: Session, inputs: Arrays, units: int, elements: int) -> dict[str, Array]:
        """Compute in one go; learn from it where it is large enough to tell."""
        try:
            if not self._costs.telling(units, elements):
                return session.infer(inputs)
            outputs, grown, _ = self._meter.of(lambda: session.infer(inputs))
        except Exception as exc:
            if meter.is_shortage(exc):
                self._costs.outgrew(units, elements)
            raise
        self._costs.learn(units, elements, grown)
        return outputs

    def _in_blocks(self, session: Session, inputs: Arrays, units: int, elements: int) -> Steps[dict[str, Array]]:
        """Compute some rows at a time; fewer where memory turns out to be short."""
        parts: list[dict[str, Array]] = []
        at = 0
        while at < units:
            count = min(self._costs.at_once(elements), units - at)
            try:
                block = self._whole(session, tensors.rows(inputs, at, at + count, session.inputs), count, elements)
            except Exception as exc:
                if not meter.is_shortage(exc) or count == 1:
                    raise
                yield  # at_once answers less now
                continue
            if any(array.shape[:1] != (count,) for array in block.values()):
                raise ValueError(f"the program gave other than {count} rows: it cannot be computed in blocks")
            parts.append(block)
            at += count
            yield
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _encoded(self, request: codec.InferRequest, outputs: Arrays) -> Steps[codec.Encoded]:
        return codec.encoding(self._model, self._version, request, outputs)

    def _guarded(self, steps: Steps[codec.Encoded]) -> Work:
        try:
            encoded = yield from steps
            if (size := sum(map(len, encoded.parts))) > (most := _LARGEST_ANSWER * self._body_limit):
                raise TooCostly(f"the answer has {size} bytes, this host sends at most {most}: ask for less at once")
        except Exception as exc:  # it failed on this input; the next request may be fine
            return self._fault(exc)
        return Kind.REPLY, {"status": 200, "header": encoded.header_length}, encoded.parts

    def _fault(self, error: Exception) -> Answer:
        """The answer to a request that failed, with whose fault it was."""
        known = (isinstance(error, HostError) and error.status < 500) or isinstance(error, DeadlineExceeded | NotReady)
        if meter.is_shortage(error) and not known:
            error = TooCostly("computing this request takes more memory than this host gives one; send less at once")
        elif not known and not isinstance(error, InvalidInput):
            text = str(error) if isinstance(error, HostError | EngineError) else f"{type(error).__name__}: {error}"
            error = ProgramFailed(text, own=self._witness is None or self._witness.fails())
        status = 400 if isinstance(error, InvalidInput) else error.status if isinstance(error, HostError) else 500
        return Kind.REPLY, {"status": status, "blame": blame.of(error)}, [codec.encode_error(str(error))]

    def _loaded(self) -> Session:
        if self._session is None:
            raise NotReady("this engine child is a spare: nothing is loaded")
        return self._session


def _write(sock: socket.socket, frame: Frame, answer: Answer) -> None:
    kind, meta, parts = answer
    frames.write(sock, frames.head(kind, frame.id, meta, sum(len(part) for part in parts)), parts)


def resident_bytes() -> int:
    """This process's resident memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def set_threads(count: int) -> None:
    """Threads that one torch operator may use, for the calling thread; nothing to set where no engine uses torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)
