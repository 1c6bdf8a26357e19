"""Fixtures come from tests/fixtures, one module per real part."""

from __future__ import annotations

from typing import Any

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


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Do not name tests by bytes: compressed ones hold the time, and all processes must find the same tests."""
    return "bytes" if isinstance(val, bytes) else None
