"""The measured processes as the stage sees them: start one, ask it, notice its end."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from weighbridge.workers.confined.environment import scrubbed

_BEAT = 1.0
"""Seconds between two signs of life while an answer is awaited."""


class ChildFailed(Exception):
    """An order failed. `kind`: memory, mode, input, engine, or died for a process that is gone."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Child:
    """One measured process. A context manager; `beat` is called every second while an answer is awaited."""

    def __init__(self, threads: int, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "weighbridge.workers.benchmarking.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            env=scrubbed(threads),
        )
        self._held = bytearray()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order and await its answer. Raises ChildFailed, and what `beat` raises."""
        self.send(do, **order)
        return self.answer()

    def send(self, do: str, **order: Any) -> None:
        """Give an order whose `answer` is awaited later. Raises ChildFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
        except BrokenPipeError:
            self._died()

    def answer(self) -> dict[str, Any]:
        """Raises ChildFailed, and what `beat` raises."""
        assert self._process.stdout is not None
        while b"\n" not in self._held:
            if not select.select([self._process.stdout], [], [], _BEAT)[0]:
                self._beat()
                continue
            data = self._process.stdout.read(1 << 16)
            if not data:
                self._died()
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if "failed" in said:
            raise ChildFailed(said["failed"], said["reason"])
        ok: dict[str, Any] = said["ok"]
        return ok

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # nothing to save, and it may be in a long computation
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                pipe.close()

    def _died(self) -> NoReturn:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = "; the kernel ends what uses too much memory this way" if code == -9 else ""
        last = f": {lines[-1]}" if lines else ""
        raise ChildFailed("died", f"the measured process ended with {how}{hint}{last}")
