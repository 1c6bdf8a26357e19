"""What the tables of rollouts and hosts say about variants."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from weighbridge.cli import fleet, rollouts, variants
from weighbridge.registry.schemas import AssignmentView, Host, ObservedModel, ObservedSlot, VariantBenchmark


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ({"": "original"}, "original"),
        ({"": "original", "k1": "original"}, "original"),
        ({"": "original", "k1": "int8"}, "int8 (1 kind), original (others)"),
        (
            {"": "original", "k1": "int8", "k2": "bf16", "k3": "int8", "k4": "original"},
            "bf16 (1 kind), int8 (2 kinds), original (others)",
        ),
        ({"": "int8", "k1": "int8"}, "int8"),
        ({}, ""),
    ],
)
def test_a_rollout_says_which_variants_it_gives(variants: dict[str, str], words: str) -> None:
    """By how many kinds of hosts get each; one name where all get the same."""
    assert rollouts.shown(variants) == words


def test_a_host_says_what_it_is_and_which_variant_it_serves() -> None:
    """The original goes without saying."""
    slots = [
        ObservedSlot(version=3, variant="int8", artifact="a", state="live"),
        ObservedSlot(version=2, variant="original", artifact="b", state="standby"),
    ]
    seen = ObservedModel(model="digits", generation=2, slots=slots)
    held = AssignmentView(model="digits", generation=2, slots=[], observed=seen)
    now = datetime.now(UTC)
    host = Host(
        id="h", name="h", device={"label": "4 × Xeon"}, epoch=1, state="enrolled", assignments=[held], created_at=now
    )
    assert fleet.serves(host) == "digits: 3 as int8 live, 2 standby"
    assert fleet.hardware(host) == "4 × Xeon"
    assert fleet.hardware(host.model_copy(update={"device": {"kind": "", "device": "cuda:1"}})) == "cuda:1"


def test_a_speed_says_its_interval_and_what_it_was_measured_beside() -> None:
    """Absolute figures of a busy machine bear a star; what is not shown yet says how to ask for it; rows of old have no
    interval."""
    figures = {"p50": 0.18e-3, "p99": 0.2e-3, "throughput": 5000.0, "memory": 1000, "speedup": 3.5, "finding": "faster"}
    said = {"artifact_digest": "a" * 64, "kind": "c" * 16, "status": "valid", **figures}
    new = VariantBenchmark.model_validate(
        {**said, "variant": "onnx", "speedup_low": 3.1, "speedup_high": 4, "contended": "hogs", "reason": "ask again"}
    )
    old = VariantBenchmark.model_validate({**said, "variant": "bf16"})
    rows = list(variants._speeds([new, old]))
    assert [row[1:5] for row in rows] == [
        ("0.180*", "0.200*", "3.50 (3.10–4.00)", "5,000*"),
        ("0.180", "0.200", "3.50", "5,000"),
    ]
    assert (variants._beside([new, old]), variants._beside([old])) == ("hogs", "")
    assert list(variants._unshown([new, old, new.model_copy(update={"reason": "older"})])) == [("onnx", "ask again")]
