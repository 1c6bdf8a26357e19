"""The process of an engine child: one loaded variant. `python -m weighbridge.hosts.child --fd N`.

It starts as a spare: torch is imported before anyone says what to load. Importing and loading take a second of
processor time that belongs to the children that serve, so the main thread drops to a low priority first and does
just that. Requests are answered by a thread that was started before and keeps the normal priority (a process without
privileges can only ever lower it). Imports here are light on purpose: the interpreter has not lowered anything yet.

It holds no token and opens nothing but its blobs; it ends when its parent does.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import threading
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from weighbridge.hosts.background import Background, yield_processor

if TYPE_CHECKING:
    from weighbridge.hosts.runner import Runner

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the parent's socket pair")
    parser.add_argument("--engine", required=True, help="module:function that loads an artifact")
    parser.add_argument("--preload", default="", help="module:function to call while still a spare")
    parser.add_argument("--body-limit", type=int, required=True, help="bytes a body may decompress to")
    parser.add_argument("--batch", type=int, default=1, help="rows of waiting requests to compute as one")
    arguments = parser.parse_args()
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    ready: list[Runner] = []
    imported = threading.Event()

    def answer() -> None:
        imported.wait()
        with socket.socket(fileno=arguments.fd) as sock:
            ready[0].serve(sock)
        yield_processor()  # giving back the memory takes milliseconds too
        os._exit(0)  # nothing to save: skip the interpreter's slow end

    threading.Thread(target=answer, name="answer", daemon=True).start()
    yield_processor()
    background = Background()
    ready.append(_runner(arguments, background))
    imported.set()
    background.serve()


def _runner(arguments: argparse.Namespace, background: Background) -> Runner:
    from weighbridge.hosts.runner import Runner

    if arguments.preload:
        _named(arguments.preload)()
    return Runner(_named(arguments.engine), background, body_limit=arguments.body_limit, batch=arguments.batch)


def _named(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, even in the middle of a computation."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
