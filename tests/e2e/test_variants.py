"""Variants, as a story: smaller forms of a version earn their place, by what they keep and by what was measured.

In one process, as tests/e2e/test_story.py. But for the last test nothing is measured here: measurements arrive as from
another machine, by `weighbridge benchmark import`'s own call. `weighbridge demo` measures for itself (test_demo.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fixtures.digits import Digits
from fixtures.house import House
from safetensors.numpy import save

from weighbridge.engines.hardware import describe
from weighbridge.registry import workers_seen
from weighbridge.registry.errors import Conflict, NotFound
from weighbridge.registry.lifecycle import kind_queue
from weighbridge.registry.schemas import Benchmark, Variant

pytestmark = pytest.mark.slow

RECIPE = """
gates: [{metric: accuracy, min: 0.8}]
variants:
  - bf16
  - int8-rows
  - int2-groups
  - fp8-dynamic
  - {method: bf16, name: tiny, max_ratio: 0.1}
quality: {keep: 0.98}
objective: {best: latency}
rollout: {automatic: true, waves: [1, "100%"], bake: 0}
"""
KIND, OTHER = "0123456789abcdef", "fedcba9876543210"
"""Two fingerprints of hardware; both hosts of the house are of the first."""


@pytest.fixture
def shop(tmp_path: Path, digits: Digits, digits_linear: Any) -> Iterator[House]:
    """A house whose one version has all of its variants, and serves as the original."""
    with ExitStack() as parts:
        house = House(tmp_path, parts, kind=KIND)
        house.register("digits-linear", digits_linear)
        house.put("recipe.yaml", RECIPE)
        house.put("eval.safetensors", save({"pixels": digits.held_out, "labels": digits.held_out_labels}))
        house.publish("monday", digits.train(rows=1397))
        house.settle()
        yield house


def variants(house: House) -> dict[str, Variant]:
    return {variant.name: variant for variant in house.version().variants}


def measure(house: House, name: str, milliseconds: float, *, kind: str = KIND, **said: Any) -> None:
    """Import what another machine of this kind measured; its latency is all that differs, and what is `said`."""
    artifact = variants(house)[name].artifact_digest
    assert artifact is not None
    p50 = milliseconds / 1e3
    speeds = {"p50": p50, "p99": 1.5 * p50, "throughput": 1 / p50, "memory": 100 << 20, "spread": 0.02}
    house.client.import_benchmark(Benchmark(artifact_digest=artifact, kind=kind, status="valid", **speeds, **said))
    house.settle()


def test_every_variant_gets_its_own_verdict_and_none_holds_the_version_back(shop: House) -> None:
    """Two are ready, a bad one is refused with its numbers, one cannot be here, one is not as small as it had to be;
    each says why, and the version serves all the same, as the original."""
    found = variants(shop)
    assert {name: variant.status for name, variant in found.items()} == {
        "original": "ready",
        "bf16": "ready",
        "int8-rows": "ready",
        "int2-groups": "rejected",
        "fp8-dynamic": "not_applicable",
        "tiny": "failed",
    }
    (gate,) = (gate for gate in found["int2-groups"].gates if gate.verdict == "failed")
    assert gate.limit == 0.98
    assert gate.observed is not None
    assert gate.observed < 0.98
    assert f"{gate.observed:.2%}"[:3] in found["int2-groups"].reason
    assert "CUDA" in found["fp8-dynamic"].reason
    assert "0.1" in found["tiny"].reason
    assert found["int8-rows"].size < found["bf16"].size < found["original"].size
    assert shop.version("champion").variants_settled
    assert {held[:2] for held in shop.held().values()} == {(1, "original")}


def test_hosts_get_the_variant_that_measured_best_on_their_kind(shop: House, digits: Digits) -> None:
    """A faster variant is a rollout of the same version; what the hosts answer then is that variant's; a host of a kind
    that nobody measured gets the original, until it is measured too."""
    measure(shop, "original", 1.0)
    measure(shop, "int8-rows", 1.2)
    assert {held[1] for held in shop.held().values()} == {"original"}
    before = shop.predict(digits.held_out)[0][1]

    measure(shop, "bf16", 0.5)
    artifact = variants(shop)["bf16"].artifact_digest
    assert shop.held() == {"left": (1, "bf16", artifact), "right": (1, "bf16", artifact)}
    (rollout, *_) = shop.client.rollouts("digits")
    assert (rollout.status, rollout.number, rollout.from_number) == ("finished", 1, 1)
    assert (rollout.from_variants[KIND], rollout.variants[KIND]) == ("original", "bf16")
    started = shop.client.events(kinds=["rollout.started"])[-1]
    assert "original → bf16" in started.reason
    assert "2.0 × faster" in started.reason
    for version, logits in shop.predict(digits.held_out):
        assert version == 1
        assert (logits != before).any()
        assert (logits.argmax(1) == digits.held_out_labels).mean() > 0.8

    shop.join("stranger", OTHER)
    shop.settle()
    assert shop.held()["stranger"][1] == "original"
    measure(shop, "original", 2.0, kind=OTHER)
    measure(shop, "int8-rows", 1.0, kind=OTHER)
    assert {name: held[1] for name, held in shop.held().items()} == {
        "left": "bf16",
        "right": "bf16",
        "stranger": "int8-rows",
    }


def test_a_ratio_measured_beside_other_work_moves_the_fleet(shop: House) -> None:
    """The choice says what it goes by, and what took the machine; who asks for another try is told what is missing."""
    beside = {"contended": "other processes took 48% of the processors"}
    for name, ratio in (("original", (0.9, 1.0, 1.12)), ("int8-rows", (0.7, 1.0, 1.4)), ("bf16", (3.1, 3.5, 4.0))):
        low, speedup, high = ratio
        finding = {"finding": "faster" if low > 1 else "same", "speedup_low": low, "speedup_high": high}
        measure(shop, name, 1.0, speedup=speedup, **finding, **beside)
    assert {held[1] for held in shop.held().values()} == {"bf16"}
    (choice,) = (choice for choice in shop.client.choices("digits") if choice.kind == KIND)
    assert choice.reason.startswith(
        "3.5 × faster than the original (3.10–4.00 × its speed), measured beside other work"
    )
    (row,) = (row for row in shop.client.benchmarks("digits") if row.variant == "bf16")
    assert (row.speedup, row.speedup_low, row.speedup_high, row.contended) == (3.5, 3.1, 4.0, beside["contended"])
    with pytest.raises(Conflict, match="version 1 has no benchmarks to run again"):
        shop.client.retry_benchmarks("digits")
    with pytest.raises(NotFound, match="variant fp16"):
        shop.client.retry_benchmarks("digits", 1, "fp16")


def test_a_better_variant_that_no_host_can_load_goes_back(shop: House) -> None:
    """The first host to fail it ends the rollout; the fleet goes on as before, and it is not tried for ever."""
    measure(shop, "original", 1.0)
    for host in shop.hosts:
        host.broken.add(1)
    measure(shop, "bf16", 0.5)
    shop.settle()

    ended = list(shop.client.rollouts("digits"))
    assert [rollout.status for rollout in ended] == ["rolled_back", "finished"]
    assert {held[1] for held in shop.held().values()} == {"original"}
    (choice,) = (choice for choice in shop.client.choices("digits") if choice.kind == KIND)
    assert choice.variant == "bf16"


def until(house: House, holds: Callable[[], bool]) -> None:
    """Settle until it does: a stage that ends without an event is no change that `settle` sees."""
    for _ in range(20):
        house.settle()
        if holds():
            return
    raise AssertionError([(one.name, one.status, one.reason, one.jobs) for one in house.version().variants])


def test_a_variant_is_measured_and_chosen_on_any_machine(
    tmp_path: Path, digits: Digits, digits_linear: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, now, whatever else runs: by its ratio to the original, with the interval; and again, when asked to."""
    monkeypatch.setenv("WEIGHBRIDGE_WORKER__BENCHMARK_SECONDS", "0.4")
    monkeypatch.setenv("WEIGHBRIDGE_WORKER__MACHINE", str(tmp_path / "machine"))
    hardware = describe()
    with ExitStack() as parts:
        house = House(tmp_path, parts, kind=hardware.kind)
        with house.database.transaction() as tx:
            queues = ["variants", kind_queue(hardware.kind)]
            workers_seen.seen(
                tx, "worker", machine="m", queues=queues, kind=hardware.kind, hardware=hardware.model_dump()
            )
        house.register("digits-linear", digits_linear)
        house.put("recipe.yaml", "{variants: [onnx], objective: {best: latency}, rollout: {automatic: true, bake: 0}}")
        house.put("eval.safetensors", save({"pixels": digits.held_out, "labels": digits.held_out_labels}))
        house.publish("monday", digits.train(rows=1397))
        until(house, lambda: {held[1] for held in house.held().values()} == {"onnx"})
        rows = {row.variant: row for row in house.client.benchmarks("digits")}
        assert {name: (row.status, row.finding) for name, row in rows.items()} == {
            "original": ("valid", "same"),
            "onnx": ("valid", "faster"),
        }
        assert house.version().variants_settled
        (choice,) = (choice for choice in house.client.choices("digits") if choice.kind == hardware.kind)
        assert f"({rows['onnx'].speedup_low:.2f}–{rows['onnx'].speedup_high:.2f} × its speed)" in choice.reason
        (job,) = house.client.retry_benchmarks("digits", "latest", "onnx")
        assert (job.state, job.attempt) == ("queued", 1)
        until(house, lambda: [row.variant for row in house.client.benchmarks("digits")].count("onnx") == 2)
