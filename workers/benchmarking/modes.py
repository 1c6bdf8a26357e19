"""The ways to run one loaded program: as it is, compiled, or replayed from a CUDA graph."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn

from weighbridge.engines.protocols import Session

_MODULE = "_module"


class ModeUnavailable(Exception):
    """This program, device or machine does not offer the mode; the message says what is missing."""


class Modes:
    """Switches one session between modes; every switch starts from the program as it was loaded."""

    def __init__(self, session: Session, device: str) -> None:
        self._session, self._device = session, device
        self._module: nn.Module | None = getattr(session, _MODULE, None)

    def switch(self, mode: str) -> None:
        """Make the next calls run in `mode`; the first compiles or captures. Raises ModeUnavailable."""
        if mode in ("eager", "onnxruntime"):
            return
        if self._module is None:
            raise ModeUnavailable(f"{mode}: the artifact does not run on torch")
        made: Any = self._compiled() if mode == "compiled" else self._graphed()
        setattr(self._session, _MODULE, made)

    def _compiled(self) -> Any:
        if self._device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise ModeUnavailable("compiled: there is no C++ compiler; install g++")
        return torch.compile(self._module, dynamic=False)

    def _graphed(self) -> Any:
        if not self._device.startswith("cuda"):
            raise ModeUnavailable("cuda_graph: needs a CUDA device")
        return _Graphed(self._module)


class _Graphed:
    """One captured graph per shape of inputs: copy in, replay, copy out."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], Any]] = {}

    def __call__(self, *inputs: torch.Tensor) -> Any:
        shapes = tuple(one.shape for one in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(inputs)
        graph, slots, outputs = self._graphs[shapes]
        for slot, one in zip(slots, inputs, strict=True):
            slot.copy_(one)
        graph.replay()
        return outputs  # the session copies them off the device before the next replay

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], Any]:
        """Three calls on a side stream first, as torch's documentation asks for."""
        slots = tuple(one.clone() for one in inputs)
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._module(*slots)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._module(*slots)
        return graph, slots, outputs
