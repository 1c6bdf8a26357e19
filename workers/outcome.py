"""What a stage says: a verdict with reason, facts and numbers. A value, never an exception; imports without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weighbridge import limits
from weighbridge.registry.lifecycle import Verdict
from weighbridge.registry.schemas import GateResult, Metric


@dataclass(frozen=True, slots=True)
class Outcome:
    """A stage's verdict. `facts` is JSON-able; `gates` and `metrics` become rows of the registry.

    A reason quotes what a file holds: it is cut.
    """

    verdict: Verdict
    reason: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    gates: Sequence[GateResult] = ()
    metrics: Sequence[Metric] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", limits.cut(self.reason))

    @classmethod
    def passed(cls, reason: str, facts: Mapping[str, Any] | None = None, **rows: Any) -> Outcome:
        return cls(Verdict.PASSED, reason, facts or {}, **rows)

    @classmethod
    def rejected(cls, reason: str, facts: Mapping[str, Any] | None = None, **rows: Any) -> Outcome:
        """Sound, but it fails a gate, its golden, or holds non-finite values."""
        return cls(Verdict.REJECTED, reason, facts or {}, **rows)

    @classmethod
    def quarantined(cls, reason: str, facts: Mapping[str, Any] | None = None) -> Outcome:
        """Hostile, corrupt, or not provably safe."""
        return cls(Verdict.QUARANTINED, reason, facts or {})

    @classmethod
    def needs_binding(cls, reason: str, facts: Mapping[str, Any] | None = None) -> Outcome:
        """Sound tensors, but no single program that they belong to."""
        return cls(Verdict.NEEDS_BINDING, reason, facts or {})

    @classmethod
    def superseded(cls, reason: str) -> Outcome:
        """The pinned content is no longer in the bucket."""
        return cls(Verdict.SUPERSEDED, reason)

    @classmethod
    def duplicate(cls, reason: str, facts: Mapping[str, Any] | None = None) -> Outcome:
        """Another version has these weights, and is the one that is judged."""
        return cls(Verdict.DUPLICATE, reason, facts or {})

    @classmethod
    def not_applicable(cls, reason: str, facts: Mapping[str, Any] | None = None, **rows: Any) -> Outcome:
        """There is nothing to measure, and nothing demands that it be measured. Never a pass."""
        return cls(Verdict.NOT_APPLICABLE, reason, facts or {}, **rows)
