"""One pass over a safetensors file: finiteness and statistics of every tensor, in constant memory, as bytes flow by.

`Inspector` is a stream around a stream: whoever reads it (a digest, a copy into a blob) gets the bytes unchanged while
a second thread looks at them. Every byte is looked at once; beside the reader's own buffer it holds 4 MiB.
"""

from __future__ import annotations

import io
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from weighbridge.engines import small_tensors
from weighbridge.engines.tensor_stats import FLOATS, WORDS, TensorStats, width
from weighbridge.storage.safetensors_header import Header, TensorInfo
from weighbridge.storage.streaming import read_into

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK = 1 << 20
"""Elements of one look, whatever buffer the reader brings."""
_RUN, _EVERY = 4096, 4
"""Squares of halves cost more than all the rest (they need converting): large blocks give every fourth run."""


class Inspector(io.RawIOBase):
    """Passes the whole of a safetensors file on and collects `stats()`. Close it to end its thread.

    The look at a buffer goes on while its reader uses it, and ends before the next `readinto` returns.
    """

    def __init__(self, stream: IO[bytes], header: Header) -> None:
        self._stream = stream
        self._tensors = header.in_file_order
        self._start = self._skip = header.data_start
        self._tally: _Tally | None = None
        """Of the tensor that arrives; there may be 200,000, so those that are done leave their statistics only."""
        self._stats: list[TensorStats] = []
        self._scratch = torch.empty(_BLOCK)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inspect")
        self._look: Future[None] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        self._wait()
        count = read_into(self._stream, view)
        if count:
            self._look = self._thread.submit(self._inspect, view[:count])
        return count

    def stats(self) -> list[TensorStats]:
        """Every tensor's, in the order of the file. Raises ValueError before the whole file has passed."""
        self._wait()
        if self._skip or len(self._stats) < len(self._tensors):
            raise ValueError("the file has not passed whole")
        return self._stats[:-1] + [replace(one, last=True) for one in self._stats[-1:]]

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        super().close()

    def _wait(self) -> None:
        if self._look is not None:
            look, self._look = self._look, None
            look.result()

    def _inspect(self, view: memoryview) -> None:
        header = min(self._skip, len(view))
        self._skip -= header
        view = view[header:]
        with torch.inference_mode():
            while len(self._stats) < len(self._tensors) and not self._skip:
                if self._tally is None and (run := small_tensors.run(self._tensors, len(self._stats), len(view))):
                    size = run[-1][1].end - run[0][1].start
                    self._stats += small_tensors.look(run, view[:size], self._start)
                    view = view[size:]
                    continue
                tally = self._tally = self._tally or _Tally(*self._tensors[len(self._stats)], self._start)
                part, view = view[: tally.left], view[tally.left :]
                tally.add(part, self._scratch)
                if tally.left:
                    break
                self._stats.append(tally.stats())
                self._tally = None


class _Tally:
    """The running statistics of one tensor, whose bytes arrive in any pieces."""

    def __init__(self, name: str, info: TensorInfo, data_start: int) -> None:
        self._name, self._info, self._offset = name, info, data_start + info.start
        self._zeros = _Zeros()
        self.left = info.end - info.start
        self._float, self._width = FLOATS.get(info.dtype), width(info)
        self._carry = b""
        self._nonfinite, self._nonzero, self._words, self._squared = 0, 0, 0, 0
        self._minimum, self._maximum, self._squares = math.inf, -math.inf, 0.0

    def add(self, view: memoryview, scratch: torch.Tensor) -> None:
        """The next bytes; an element cut by their end waits for the rest of it."""
        self.left -= len(view)
        if self._carry:
            need = self._width - len(self._carry)
            self._carry += view[:need]
            view = view[need:]
            if len(self._carry) < self._width:
                return
            self._look(bytearray(self._carry), scratch)
        whole = len(view) - len(view) % self._width
        self._carry = bytes(view[whole:])
        step = _BLOCK * self._width
        for start in range(0, whole, step):
            self._look(view[start : min(whole, start + step)], scratch)

    def stats(self) -> TensorStats:
        count, info = math.prod(self._info.shape), self._info
        known = self._minimum <= self._maximum
        return TensorStats(
            name=self._name,
            dtype=info.dtype,
            shape=info.shape,
            nbytes=info.end - info.start,
            nonfinite=self._nonfinite,
            zeros=max(0, min(count, self._words - self._nonzero)),
            minimum=self._minimum if known else None,
            maximum=self._maximum if known else None,
            rms=math.sqrt(self._squares / self._squared) if known else None,
            offset=self._offset,
            zero_tail=self._zeros.run,
            hole=self._zeros.longest,
        )

    def _look(self, data: memoryview | bytearray, scratch: torch.Tensor) -> None:
        words: np.ndarray[Any, Any] = np.frombuffer(data, dtype=WORDS[self._width])
        if not words.flags.aligned:
            words = words.copy()
        self._words += words.size
        nonzero = int(np.count_nonzero(words))
        self._nonzero += nonzero
        self._zeros.add(words, nonzero)
        if self._float is None:
            return
        values = torch.from_numpy(words.view(np.int8)).view(self._float)
        if values.element_size() == 1:
            values = values.float()
        low, high = (float(value) for value in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            values = self._without_nonfinite(values)
            if not values.numel():
                return
            low, high = (float(value) for value in torch.aminmax(values))
        self._minimum, self._maximum = min(self._minimum, low), max(self._maximum, high)
        squares, count = _squares(values, scratch)
        self._squares, self._squared = self._squares + squares, self._squared + count

    def _without_nonfinite(self, values: torch.Tensor) -> torch.Tensor:
        """Rare and slow: count what is not finite and go on with the rest."""
        finite = torch.isfinite(values)
        rest = values[finite]
        self._nonfinite += values.numel() - rest.numel()
        return rest


class _Zeros:
    """Runs of zeros in words that arrive in looks. What lies within one look, and touches neither end, is not seen."""

    def __init__(self) -> None:
        self.run = self.longest = 0
        """Bytes: of the run that the words so far end in, and of the longest that others follow."""

    def add(self, words: np.ndarray[Any, Any], nonzero: int) -> None:
        """Costs what the runs at both ends are long, and nothing where there are none."""
        if not nonzero:
            self.run += words.nbytes
            return
        if nonzero == words.size:
            self.longest, self.run = max(self.longest, self.run), 0
            return
        self.longest = max(self.longest, self.run + _leading_zeros(words) * words.itemsize)
        self.run = _leading_zeros(words[::-1]) * words.itemsize


def _leading_zeros(words: np.ndarray[Any, Any]) -> int:
    """How many words are zero before the first that is not; there is one."""
    start, size = 0, 1
    while not (part := words[start : start + size]).any():
        start, size = start + len(part), size * 4
    return start + int(np.flatnonzero(part)[0])


def _squares(values: torch.Tensor, scratch: torch.Tensor) -> tuple[float, int]:
    """Σ v² of how many elements, in float32 where that holds it; halves go through `scratch`, which stays in cache."""
    if values.element_size() == 2:
        runs = values.numel() // _RUN
        if runs >= 4 * _EVERY:
            sample = values[: runs * _RUN].view(runs, _RUN)[::_EVERY]
            values = scratch[: sample.numel()].view(sample.shape).copy_(sample).view(-1)
        else:
            values = scratch[: values.numel()].copy_(values)
    total = float(torch.dot(values, values))
    if math.isinf(total):
        wide = values.double()
        total = float(torch.dot(wide, wide))
    return total, values.numel()
