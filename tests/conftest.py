"""Fixtures come from tests/fixtures, one module per real part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest_plugins: list[str] = [
    "fixtures.beside",
    "fixtures.serving",
    "fixtures.storage",
    "fixtures.refusing",
    "fixtures.engines",
    "fixtures.postgres",
    "fixtures.registry",
    "fixtures.api",
    "fixtures.broker",
    "fixtures.worker",
    "fixtures.digits",
    "fixtures.house",
    "fixtures.running",
    "fixtures.plant",
    "fixtures.confined",
    "fixtures.odd_files",
]


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The index of this user's registries: the tests' own, also for the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Do not name tests by bytes: compressed ones hold the time, and all processes must find the same tests."""
    return "bytes" if isinstance(val, bytes) else None
