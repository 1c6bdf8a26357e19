"""Fixtures come from tests/fixtures, one module per real part."""

from __future__ import annotations

pytest_plugins: list[str] = [
    "fixtures.beside",
    "fixtures.serving",
    "fixtures.storage",
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
]
