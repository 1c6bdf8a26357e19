"""The judge: does the wave serve well enough? A limit on what is the version's own, a comparison for the rest.

What may lie in the requests (hosts.blame: input errors, refusals) says nothing by itself: a client that sends nonsense
gets no answer from any version. So it is compared with the old version, by Fisher's exact test on the counts (requests
without and with an answer, new and old). Hosts that serve the old one meanwhile see the same clients: a difference
there is harm. What the old one served *before* the move may have had other clients: a difference only holds. A test
that goes on with every interval (canary.md) will sit here.

Pure: numbers in, a finding out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weighbridge.registry.recipe import RolloutSettings

SURE, DOUBT = 1e-5, 0.01
"""One-sided p-values. Below SURE it is harm: looked at after every request of a bake, two equal hosts with 10% failures
differ so much in 0 of 1,000 bakes (at 1e-4: in 2). Below DOUBT it is not the same yet: more requests decide."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests that say something about a version, and those of them that got no answer, by blame."""

    requests: int = 0
    errors: int = 0
    """The version's own."""
    input_errors: int = 0
    """Failed on grounds that may lie in what was asked."""
    refused: int = 0
    """Outside the version's contract."""

    @property
    def failed(self) -> int:
        return self.errors + self.input_errors + self.refused

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.requests + other.requests,
            self.errors + other.errors,
            self.input_errors + other.input_errors,
            self.refused + other.refused,
        )

    def __sub__(self, other: Counts) -> Counts:
        """What came since `other`; all of it where counting began anew."""
        if self.requests < other.requests:
            return self
        return self + Counts(-other.requests, -other.errors, -other.input_errors, -other.refused)


NOTHING = Counts()


@dataclass(frozen=True, slots=True)
class Sample:
    """What one host served since its present assignment went live."""

    host: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class Old:
    """What the old version served: `beside` the wave, at the same time; `before` it, on the wave's own hosts."""

    beside: Counts = NOTHING
    before: Counts = NOTHING


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


Finding = Healthy | Inconclusive | Harm


def judge(wave: Sequence[Sample], old: Old, settings: RolloutSettings) -> Finding:
    """Name the worst that is found on any host of the wave; one with fewer than `min_requests` decides nothing."""
    floor = max(settings.min_requests, 1)
    findings = [_judged(sample, old, settings, floor) for sample in wave if sample.counts.requests >= floor]
    for kind in (Harm, Inconclusive):
        for finding in findings:
            if isinstance(finding, kind):
                return finding
    return Healthy()


def _judged(sample: Sample, old: Old, settings: RolloutSettings, floor: int) -> Finding:
    counts, limit = sample.counts, settings.max_error_rate
    rate = counts.errors / counts.requests
    if rate > limit:
        return Harm(
            f"host {sample.host}: {counts.errors} of {counts.requests} requests failed "
            f"({rate:.2%}; at most {limit:.2%})"
        )
    words = f"host {sample.host}: {counts.failed} of {counts.requests} requests got no answer"
    if old.beside.requests >= floor:
        return _compared(words, counts, old.beside, "beside it", limit)
    if old.before.requests >= floor:
        finding = _compared(words, counts, old.before, "before it", limit)
        return (
            Inconclusive(f"{finding.reason}, perhaps from other clients; {_DECIDE}")
            if isinstance(finding, Harm)
            else finding
        )
    if counts.input_errors > limit * counts.requests:
        return Inconclusive(
            f"host {sample.host}: {counts.input_errors} of {counts.requests} requests failed inside the program, and "
            f"nothing serves the old version to compare with; {_DECIDE}"
        )
    return Healthy()


_DECIDE = "promote or abort"


def _compared(words: str, new: Counts, old: Counts, where: str, limit: float) -> Finding:
    """Harm needs both: a difference that matters (the limit) and one that chance does not make."""
    if new.failed / new.requests - old.failed / old.requests <= limit:
        return Healthy()
    chance = tail(new.failed, new.requests, old.failed, old.requests)
    words += f", of the old version {where} {old.failed} of {old.requests}"
    if chance < SURE:
        return Harm(f"{words} (p = {chance:.1g})")
    if chance < DOUBT:
        return Inconclusive(f"{words}: too few to tell, wait for more requests, {_DECIDE}")
    return Healthy()


def tail(failed: int, requests: int, old_failed: int, old_requests: int) -> float:
    """Fisher's exact test, one-sided: the chance of `failed` or more here if both had one rate (hypergeometric)."""
    from scipy.stats import hypergeom  # a second of imports, which most bakes never need

    return float(hypergeom.sf(failed - 1, requests + old_requests, failed + old_failed, requests))
