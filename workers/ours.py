"""Whose failure is it? What goes wrong with this machine is never a verdict about a checkpoint.

An error that a stage could not foresee (a full disk, too many open files, a missing package, no memory left) is found
by what caused it, however it was wrapped on the way. Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator

_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "failed to allocate memory",
    "bad allocation",
    "std::bad_alloc",
)
"""How torch and onnxruntime say it, in lower case."""


class OwnFailure(Exception):
    """Something is wrong with this machine, and nothing is said of the checkpoint: it waits, and is tried again."""


class ChildFailed(Exception):
    """A confined child did not end with an outcome, for a reason that is not shown to be the checkpoint's."""


class TooLong(ChildFailed):
    """It did not end within the time that it had."""


class ChildDied(ChildFailed):
    """Its process ended in the middle of it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch or onnxruntime says that memory is used up."""
    if isinstance(error, MemoryError):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _MEMORY)


def is_ours(error: BaseException) -> bool:
    """Whether this, or what it was raised from, tells of the machine and not of what lies in storage."""
    return any(isinstance(one, OSError | ImportError | OwnFailure) or out_of_memory(one) for one in chain(error))


def raise_ours(error: BaseException) -> None:
    """Raise OwnFailure where it is ours: to be called before an error becomes a verdict."""
    if is_ours(error):
        raise OwnFailure(f"{type(error).__name__}: {error}") from error


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, each once."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
