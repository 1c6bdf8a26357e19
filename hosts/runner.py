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

from weighbridge.engines.errors import InvalidInput
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import Array, Session
from weighbridge.hosts import codec, frames
from weighbridge.hosts.background import Background
from weighbridge.hosts.errors import DeadlineExceeded, HostError, NotReady
from weighbridge.hosts.frames import Frame, Kind
from weighbridge.hosts.golden import Golden


class Runner:
    """Answers frames. `load` is an engine's: load(manifest, blobs, *, device, factories) → Session.

    Slow work that nobody waits for in a live request runs in `background`.
    """

    def __init__(self, load: Callable[..., Session], background: Background, *, body_limit: int) -> None:
        self._load, self._background, self._body_limit = load, background, body_limit
        self._session: Session | None = None
        self._golden: Golden | None = None
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
        paths = BlobFolder(Path(blobs))

        def load() -> tuple[Session, Golden]:
            set_threads(threads)
            session = self._load(parsed, paths, device=device, factories=frozenset(factories))
            return session, Golden.read(parsed.golden, paths(parsed.golden.digest))

        self._session, self._golden = self._background.run(load)
        self._model, self._version = model, version
        set_threads(threads)  # OpenMP counts threads per calling thread; this one will infer
        gc.collect()
        gc.freeze()
        return {"seconds": time.monotonic() - began, "rss": resident_bytes()}

    def _check_golden(self, *, rounds: int) -> dict[str, Any]:
        """Run the golden inputs once in the background, then `rounds` times as requests; the last outputs count."""
        session, golden = self._loaded(), self._golden
        assert golden is not None  # loaded together
        began = time.monotonic()
        outputs = self._background.run(lambda: session.infer(golden.inputs))
        for _ in range(rounds):
            outputs = self._warm_up(golden)
        return {"worst": golden.check(outputs), "seconds": time.monotonic() - began}

    def _warm_up(self, golden: Golden) -> dict[str, Array]:
        """The whole path of a request, in the thread that will answer: caches are per thread, imports are lazy."""
        body = codec.encode_request(golden.inputs)
        request = codec.decode(bytearray(b"".join(body.parts)), body.header_length)
        outputs = self._loaded().infer(request.inputs)
        codec.encode(self._model, self._version, request, outputs)
        return outputs

    def _infer(self, frame: Frame) -> tuple[Kind, dict[str, Any], list[bytes | memoryview]]:
        try:
            encoded = self._predict(frame)
        except HostError as exc:
            return Kind.REPLY, {"status": exc.status}, [codec.encode_error(str(exc))]
        except InvalidInput as exc:
            return Kind.REPLY, {"status": 400}, [codec.encode_error(str(exc))]
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


class BlobFolder:
    """Where verified blobs lie: `<folder>/<2 hex>/<digest>`. Raises LookupError for one that is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, digest: str) -> Path:
        path = self._folder / digest[:2] / digest
        if not path.is_file():
            raise LookupError(f"blob {digest} is not on this host")
        return path


def resident_bytes() -> int:
    """This process's resident memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def set_threads(count: int) -> None:
    """Threads that one torch operator may use, for the calling thread; nothing to set where no engine uses torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)
