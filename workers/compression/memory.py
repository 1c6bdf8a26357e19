"""Tell an exhausted memory from other errors: it is cured by a smaller batch."""

from __future__ import annotations

import gc

import torch

_SAID = ("not enough memory", "can't allocate memory", "failed to allocate memory", "bad allocation", "std::bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch or onnxruntime says that memory is exhausted."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def release() -> None:
    """Give back what an attempt that failed still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
