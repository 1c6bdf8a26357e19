"""Verdicts of gates, with the numbers that decided them in words."""

from __future__ import annotations

from weighbridge.registry.schemas import GateResult


def result(gate: str, passed: bool, observed: float, limit: float, reason: str) -> GateResult:
    verdict = "passed" if passed else "failed"
    return GateResult(gate=gate, verdict=verdict, observed=observed, limit=limit, reason=reason)


def unmeasured(gate: str, limit: float, reason: str) -> GateResult:
    """A gate without evidence is not passed."""
    return GateResult(gate=gate, verdict="failed", limit=limit, reason=reason)


def not_applicable(gate: str, limit: float, reason: str) -> GateResult:
    """A gate that has nothing to judge here, and decides nothing."""
    return GateResult(gate=gate, verdict="not_applicable", limit=limit, reason=reason)


def bound(gate: str, name: str, observed: float, limit: float, *, least: bool) -> GateResult:
    """Whether a number reaches a `least` value, or stays within a most; the reason ends with `(min)` or `(max)`."""
    passed = observed >= limit if least else observed <= limit
    sign = {(True, True): "≥", (True, False): "<", (False, True): "≤", (False, False): ">"}[least, passed]
    said = f"{name} {number(observed, limit)} {sign} {number(limit, observed)} ({'min' if least else 'max'})"
    return result(gate, passed, observed, limit, said)


def number(value: float, other: float) -> str:
    """Two digits, or as many as tell it from the other and, unless it is one, from zero."""
    digits = next((digits for digits in range(2, 9) if f"{value:.{digits}f}" != f"{other:.{digits}f}"), 2)
    said = f"{value:.{digits}f}"
    return said if value == 0 or float(said) else f"{value:.2g}"


def percent(share: float, other: float) -> str:
    return f"{number(100 * share, 100 * other)}%"
