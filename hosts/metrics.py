"""What the front exposes to Prometheus: per model and version, from the slots' own counts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from weighbridge.hosts.blame import Blame
from weighbridge.hosts.router import Slots, State
from weighbridge.hosts.statistics import BOUNDS

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_LABELS = ["model", "version", "variant"]


class SlotCollector(Collector):
    """Turns the slots' statistics into metric families when somebody asks."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("weighbridge_requests", "Requests answered", labels=_LABELS)
        errors = CounterMetricFamily("weighbridge_errors", "Failures that are the version's own", labels=_LABELS)
        blamed = CounterMetricFamily(
            "weighbridge_unanswered", "Requests without their answer, by whose fault it was", labels=[*_LABELS, "blame"]
        )
        latency = HistogramMetricFamily("weighbridge_latency_seconds", "Arrival to answer", labels=_LABELS)
        in_flight = GaugeMetricFamily("weighbridge_in_flight", "Requests without an answer yet", labels=_LABELS)
        ready = GaugeMetricFamily("weighbridge_ready", "1 when the version answers", labels=_LABELS)
        for slot in self._slots:
            labels = [slot.spec.model, slot.spec.version, slot.spec.variant]
            seen = slot.statistics
            requests.add_metric(labels, seen.requests)
            errors.add_metric(labels, seen.blamed[Blame.VERSION])
            for fault in Blame:
                if fault is not Blame.NONE:
                    blamed.add_metric([*labels, fault], seen.blamed[fault])
            bounds = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
            buckets = list(zip(bounds, map(float, accumulate(seen.counts)), strict=True))
            latency.add_metric(labels, buckets=buckets, sum_value=seen.latency_sum)
            in_flight.add_metric(labels, slot.in_flight)
            ready.add_metric(labels, slot.state is State.READY)
        yield from (requests, errors, blamed, latency, in_flight, ready)


def render(slots: Slots) -> bytes:
    """All metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SlotCollector(slots))
    return generate_latest(registry)
