"""What a confined child is told: its task, and the limits that hold while it reads and while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """`cpu_seconds` and `memory_bytes` (beyond an idle child's) while it reads; `seconds` and `most_bytes` in all."""

    cpu_seconds: float = 20.0
    memory_bytes: int = 224 << 20
    seconds: float = 3600.0
    most_bytes: int = 1 << 62


@dataclass(frozen=True)
class Order:
    """What a child is told: its task, and the limits while it reads (processor seconds, bytes beyond what it has)."""

    task: object
    cpu_seconds: float
    memory_bytes: int
    threads: int
    niceness: int
    scratch: Path
