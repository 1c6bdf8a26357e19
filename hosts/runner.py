"""What an engine child does with frames: load, prove, infer. One session, one request at a time."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from weighbridge.engines import golden
from weighbridge.engines.errors import EngineError, InvalidInput
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import Array, Arrays, Session
from weighbridge.hosts import batching, codec, frames
from weighbridge.hosts.background import Background
from weighbridge.hosts.errors import DeadlineExceeded, HostError, NotReady
from weighbridge.hosts.frames import Frame, Kind
from weighbridge.storage.local_cache import BlobCache

log = logging.getLogger(__name__)

Answer = tuple[Kind, dict[str, Any], list[bytes | memoryview]]
"""Kind, meta and the body's parts."""


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

    def serve(self, sock: socket.socket) -> None:
        """Answer until the parent asks for the end or goes away."""
        while (frame := frames.read(sock)) is not None and frame.kind != Kind.EXIT:
            if frame.kind != Kind.INFER:
                _write(sock, frame, self._answer(frame))
                continue
            asked, after = self._waiting(sock, frame)
            for one, answer in zip(asked, self._infer(asked), strict=True):
                _write(sock, one, answer)
            if after is not None and after.kind == Kind.EXIT:
                return
            if after is not None:
                _write(sock, after, self._answer(after))

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
    ) -> dict[str, Any]:
        began = time.monotonic()
        parsed = Manifest.model_validate_json(manifest)
        paths = BlobCache(Path(blobs)).path

        def load() -> Session:
            set_threads(threads)
            return self._load(parsed, paths, device=device, factories=factories)

        self._session = self._background.run(load)
        self._golden = paths(parsed.golden.digest).read_bytes(), parsed.golden.tolerance
        self._model, self._version = model, version
        set_threads(threads)  # OpenMP counts threads per calling thread; this one will infer
        return {"seconds": time.monotonic() - began, "rss": resident_bytes()}

    def _check_golden(self, *, rounds: int) -> dict[str, Any]:
        """Prove the reference golden in the background, then answer its inputs `rounds` times as requests."""
        session, (data, tolerance) = self._loaded(), self._golden
        began = time.monotonic()
        self._background.run(lambda: golden.check(session, data, *tolerance))
        inputs, expected = golden.read(data)
        for _ in range(rounds):
            golden.compare(self._warm_up(inputs), expected, *tolerance)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection in the middle of a request walks over it
        return {"seconds": time.monotonic() - began}

    def _warm_up(self, inputs: Arrays) -> dict[str, Array]:
        """The whole path of a request, in the thread that will answer: caches are per thread, imports are lazy."""
        body = codec.encode_request(inputs)
        request = codec.decode(bytearray(b"".join(body.parts)), body.header_length)
        outputs = self._loaded().infer(request.inputs)
        codec.encode(self._model, self._version, codec.InferRequest({}, binary_output=True), outputs)
        return outputs

    def _infer(self, asked: list[Frame]) -> list[Answer]:
        """One answer for each, in order. A batch that fails is computed one by one: each has its own fault or none."""
        if len(asked) == 1 or (session := self._session) is None:
            return [_guarded(partial(self._one, frame)) for frame in asked]
        answers: dict[int, Answer] = {}
        decoded: dict[int, codec.InferRequest] = {}
        for index, frame in enumerate(asked):
            try:
                decoded[index] = self._decode(frame)
            except Exception as exc:
                answers[index] = _fault(exc)
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
                    index: _guarded(partial(self._encode, request, its))
                    for (index, request), its in zip(requests.items(), outputs, strict=True)
                }
        return {index: _guarded(partial(self._predict, request)) for index, request in requests.items()}

    def _one(self, frame: Frame) -> codec.Encoded:
        return self._predict(self._decode(frame))

    def _predict(self, request: codec.InferRequest) -> codec.Encoded:
        return self._encode(request, self._loaded().infer(request.inputs))

    def _encode(self, request: codec.InferRequest, outputs: Arrays) -> codec.Encoded:
        return codec.encode(self._model, self._version, request, outputs)

    def _decode(self, frame: Frame) -> codec.InferRequest:
        meta = frame.meta
        if time.monotonic() > meta["deadline"]:
            raise DeadlineExceeded("the deadline passed while the request waited for the engine")
        body = frame.body
        if encoding := meta.get("encoding"):
            body = memoryview(bytearray(codec.decompress(body, encoding, self._body_limit)))
        return codec.decode(body, meta.get("header"))

    def _loaded(self) -> Session:
        if self._session is None:
            raise NotReady("this engine child is a spare: nothing is loaded")
        return self._session


def _guarded(compute: Callable[[], codec.Encoded]) -> Answer:
    try:
        encoded = compute()
    except Exception as exc:  # the engine failed on this input; the next request may be fine
        return _fault(exc)
    return Kind.REPLY, {"status": 200, "header": encoded.header_length}, encoded.parts


def _fault(exc: Exception) -> Answer:
    status, text = 500, f"{type(exc).__name__}: {exc}"
    if isinstance(exc, HostError):
        status, text = exc.status, str(exc)
    elif isinstance(exc, EngineError):
        status, text = 400 if isinstance(exc, InvalidInput) else 500, str(exc)
    return Kind.REPLY, {"status": status}, [codec.encode_error(text)]


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
