"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: whether it is well, in words, and what to do otherwise."""

    part: str
    ok: bool
    what: str
    fix: str = ""
