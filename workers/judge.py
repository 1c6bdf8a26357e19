"""The judge: does the wave serve well enough? For now the absolute error limit; a statistical test will sit here.

Pure: numbers in, a finding out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weighbridge.registry.recipe import RolloutSettings


@dataclass(frozen=True, slots=True)
class Sample:
    """What one host served since its present assignment went live."""

    host: str
    requests: int
    errors: int
    """The server's own failures, not bad requests."""


@dataclass(frozen=True, slots=True)
class Healthy:
    """Nothing speaks against the wave."""


@dataclass(frozen=True, slots=True)
class Inconclusive:
    """The numbers decide nothing yet; `missing` says what would."""

    missing: str


@dataclass(frozen=True, slots=True)
class Harm:
    """The wave does harm; `reason` names the host and the numbers."""

    reason: str


def judge(wave: Sequence[Sample], rest: Sequence[Sample], settings: RolloutSettings) -> Healthy | Inconclusive | Harm:
    """Compare the wave with the absolute limit; `rest`, the fleet's other hosts, is for the test that compares.

    A host with fewer than `min_requests` decides nothing and holds nothing up.
    """
    for sample in wave:
        if sample.requests < max(settings.min_requests, 1):
            continue
        rate = sample.errors / sample.requests
        if rate > settings.max_error_rate:
            return Harm(
                f"host {sample.host}: {sample.errors} of {sample.requests} requests failed "
                f"({rate:.2%}; at most {settings.max_error_rate:.2%})"
            )
    return Healthy()
