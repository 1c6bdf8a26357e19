"""What an engine child does with frames: load, prove, infer. One session, one request at a time."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weighbridge.engines import golden
from weighbridge.engines.errors import EngineError, InvalidInput
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import Array, Arrays, Session
from weighbridge.hosts import codec, frames
from weighbridge.hosts.background import Background
from weighbridge.hosts.errors import DeadlineExceeded, HostError, NotReady
from weighbridge.hosts.frames import Frame, Kind
from weighbridge.storage.local_cache import BlobCache


class Runner:
    """Answers frames. `load` is an engine's: load(manifest, blobs, *, device, factories) → Session.

    Slow work that nobody waits for in a live request runs in `background`.
    """

    def __init__(self, load: Callable[..., Session], background: Background, *, body_limit: int) -> None:
        self._load, self._background, self._body_limit = load, background, body_limit
        self._session: Session | None = None
        self._golden = (b"", 0.0, 0.0)
        self._model = self._version = ""

    def serve(self, sock: socket.socket) -> None:
        """Answer until the parent asks for the end or goes away."""
        while (frame := frames.read(sock)) is not None and frame.kind != Kind.EXIT:
            kind, meta, parts = self._answer(frame)
            size = sum(len(part) for part in parts)
            frames.write(sock, frames.head(kind, frame.id, meta, size), parts)

    def _answer(self, frame: Frame) -> tuple[Kind, dict[str, Any], list[bytes | memoryview]]:
        if frame.kind == Kind.INFER:
            return self._infer(frame)
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
        self._golden = paths(parsed.golden.digest).read_bytes(), parsed.golden.rtol, parsed.golden.atol
        self._model, self._version = model, version
        set_threads(threads)  # OpenMP counts threads per calling thread; this one will infer
        return {"seconds": time.monotonic() - began, "rss": resident_bytes()}

    def _check_golden(self, *, rounds: int) -> dict[str, Any]:
        """Prove the reference golden in the background, then answer its inputs `rounds` times as requests."""
        session, (data, rtol, atol) = self._loaded(), self._golden
        began = time.monotonic()
        self._background.run(lambda: golden.check(session, data, rtol, atol))
        inputs, expected = golden.read(data)
        for _ in range(rounds):
            golden.compare(self._warm_up(inputs), expected, rtol, atol)
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

    def _infer(self, frame: Frame) -> tuple[Kind, dict[str, Any], list[bytes | memoryview]]:
        try:
            encoded = self._predict(frame)
        except HostError as exc:
            return Kind.REPLY, {"status": exc.status}, [codec.encode_error(str(exc))]
        except InvalidInput as exc:
            return Kind.REPLY, {"status": 400}, [codec.encode_error(str(exc))]
        except EngineError as exc:
            return Kind.REPLY, {"status": 500}, [codec.encode_error(str(exc))]
        except Exception as exc:  # the engine failed on this input; the next request may be fine
            return Kind.REPLY, {"status": 500}, [codec.encode_error(f"{type(exc).__name__}: {exc}")]
        return Kind.REPLY, {"status": 200, "header": encoded.header_length}, encoded.parts

    def _predict(self, frame: Frame) -> codec.Encoded:
        meta = frame.meta
        if time.monotonic() > meta["deadline"]:
            raise DeadlineExceeded("the deadline passed while the request waited for the engine")
        body = frame.body
        if encoding := meta.get("encoding"):
            body = memoryview(bytearray(codec.decompress(body, encoding, self._body_limit)))
        request = codec.decode(body, meta.get("header"))
        outputs = self._loaded().infer(request.inputs)
        return codec.encode(self._model, self._version, request, outputs)

    def _loaded(self) -> Session:
        if self._session is None:
            raise NotReady("this engine child is a spare: nothing is loaded")
        return self._session


def resident_bytes() -> int:
    """This process's resident memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def set_threads(count: int) -> None:
    """Threads that one torch operator may use, for the calling thread; nothing to set where no engine uses torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)
