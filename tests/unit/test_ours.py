"""Whose failure is it? By what caused it, however wrapped; and what becomes of a version that nobody can judge."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.house import House

from weighbridge.engines.errors import EngineError, LoadError
from weighbridge.registry import jobs
from weighbridge.registry.errors import Conflict, NothingToCome
from weighbridge.workers import validate
from weighbridge.workers.ours import ChildDied, OwnFailure, is_ours, raise_ours


def wrapped(cause: BaseException, outer: Callable[[str], Exception] = LoadError) -> Exception:
    """As an engine says it."""
    try:
        try:
            raise cause
        except BaseException as inner:
            raise outer(f"it does not load: {inner}") from inner
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.EMFILE, "too many open files"),
        OSError(errno.ENOSPC, "no space left"),
        PermissionError(errno.EACCES, "permission denied"),
        ModuleNotFoundError("No module named 'torchvision'"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 1 TB"),
        torch.OutOfMemoryError("device full"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_what_is_wrong_with_the_machine_is_ours(cause: BaseException) -> None:
    """Bare, wrapped once or twice."""
    for error in (cause, wrapped(cause), wrapped(wrapped(cause), EngineError)):
        assert is_ours(error)
        with pytest.raises(OwnFailure):
            raise_ours(error)


@pytest.mark.parametrize(
    "error",
    [
        LoadError("the manifest's binding is not the one of these files"),
        wrapped(RuntimeError("size mismatch for w")),
        wrapped(ValueError("negative dimensions")),
        wrapped(KeyError("w")),
    ],
)
def test_what_is_wrong_with_the_bytes_is_not(error: Exception) -> None:
    """It becomes a verdict."""
    assert not is_ours(error)
    raise_ours(error)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(validate, "load", load)


@pytest.fixture
def shop(house: House, digits_linear: Any) -> House:
    house.register("digits-linear", digits_linear)
    return house


WEIGHTS = {"linear.weight": np.ones((10, 64), np.float32), "linear.bias": np.zeros(10, np.float32)}


def test_a_missing_package_condemns_nobody(shop: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It said needs_binding, or rejected, of a good checkpoint; now its job waits, and the words name the package."""
    failing(monkeypatch, wrapped(ModuleNotFoundError("No module named 'torchvision'")))
    shop.publish("monday", WEIGHTS)
    shop.settle()
    version = shop.version()
    (job,) = version.jobs
    assert (version.status, job.state) == ("discovered", "queued")
    assert "No module named 'torchvision'" in job.reason


def test_what_ends_two_workers_is_shown_and_brought_back(shop: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """`status` names it, `wait` ends, nothing serves it; `rejudge` begins anew when the cause is mended."""
    good = validate.load
    failing(monkeypatch, ChildDied("its child was ended by signal SIGKILL"))
    shop.publish("monday", WEIGHTS)
    shop.settle()
    with shop.database.transaction() as tx:  # its second try is due in some seconds
        jobs.wake(tx, "version", 1)
    shop.settle()
    (stuck,) = shop.client.status().set_aside
    assert (stuck.model, stuck.number, stuck.path) == ("digits", 1, "digits/monday/")
    assert "2 workers ended in the middle of it, the last one so: its child was ended by signal SIGKILL" in stuck.reason
    with pytest.raises(NothingToCome, match="set aside") as told:
        shop.client.wait("digits", version=1, timeout=5)
    assert told.value.reason == stuck.reason
    assert shop.serving() == set()

    monkeypatch.setattr(validate, "load", good)
    shop.client.rejudge("digits", 1)
    assert shop.client.status().set_aside == []
    with pytest.raises(Conflict, match="is being judged"):
        shop.client.rejudge("digits", 1)
    shop.settle()
    assert shop.version(1).status == "ready"
