"""How long from a complete object to answers from every host, and where the time goes: `weighbridge up`, two hosts.

    python benchmarks/live.py [--drops 20] [--gap 8]

A small checkpoint is renamed into the watched folder: that is complete. Live is the moment at which both hosts answer
an HTTP inference request from the new version, asked every 10 ms. The phases between are the registry's own times. The
gap lets the hosts have their next engine child warm, as a trainer that publishes every few minutes does.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import save

from weighbridge import Client
from weighbridge.cli.template import parse_input, register_template
from weighbridge.demo import digits, stage

MODEL = "digits"
GATES = "gates: [{metric: accuracy, min: 0.8}]\n"
LANES = {
    "default": GATES + 'rollout: {automatic: true, waves: [1, "100%"], bake: 0}\n',
    "fast": "lane: fast\n" + GATES + 'rollout: {automatic: true, waves: [1, "100%"], bake: 0}\n',
    "fast, one wave": "lane: fast\n" + GATES + 'rollout: {automatic: true, waves: ["100%"], bake: 0}\n',
}
PATIENCE = 60.0


@dataclass(frozen=True)
class Drop:
    """When each thing happened, in seconds after the object was complete."""

    phases: dict[str, float]
    live: float


class Bench:
    """One running house."""

    def __init__(self, client: Client, hosts: list[str], folder: Path) -> None:
        self._client, self._hosts, self._folder = client, hosts, folder / MODEL
        self._http = httpx.Client(trust_env=False)
        module = digits.train(60, seed=1)
        self._weights = {name: value.numpy() for name, value in module.state_dict().items()}
        self._chance = np.random.default_rng(1)
        self._dropped = 0

    def prepare(self) -> None:
        inputs = [parse_input(f"{digits.INPUT}=FP32[-1,64]")]
        register_template(self._client, digits.TEMPLATE, digits.FACTORY, inputs, (digits.OUTPUT,))
        self._folder.mkdir(parents=True, exist_ok=True)
        digits.write_evaluation_set(self._folder / "eval.safetensors")

    def lane(self, recipe: str, drops: int, gap: float) -> Iterator[Drop]:
        """Measure so many drops; the first, which has nothing to replace, is not counted."""
        (self._folder / "recipe.yaml").write_text(recipe)
        for number in range(drops + 1):
            time.sleep(gap)
            one = self._drop()
            if number:
                yield one

    def _drop(self) -> Drop:
        self._dropped += 1
        name = f"{self._dropped:04}.safetensors"
        noisy = {key: value + self._chance.normal(0, 1e-4, value.shape).astype(value.dtype)
                 for key, value in self._weights.items()}  # fmt: skip
        beside = self._folder / f".{name}"
        beside.write_bytes(save(noisy))
        seen = self._client.status().last_seq
        beside.rename(self._folder / name)
        complete = time.time()
        live = self._until_live(f"{MODEL}/{name}", complete)
        return Drop(self._phases(seen, complete), live)

    def _until_live(self, path: str, complete: float) -> float:
        waiting = {host: f"{host}/v2/models/{MODEL}/infer" for host in self._hosts}
        body = {"inputs": [{"name": digits.INPUT, "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]}
        while waiting:
            if time.time() - complete > PATIENCE:
                raise SystemExit(f"{path} is not live on {', '.join(waiting)} after {PATIENCE:g} s")
            for host, url in list(waiting.items()):
                answer = self._http.post(url, json=body)
                if answer.status_code == 200 and answer.json()["model_version"] == str(self._dropped):
                    del waiting[host]
            time.sleep(0.01 if waiting else 0.0)
        return time.time() - complete

    def _phases(self, seen: int, complete: float) -> dict[str, float]:
        """From the version's jobs, the rollout's events and the hosts' reports."""
        while not (ended := self._client.events(seen, kinds=["rollout.finished", "rollout.rolled_back"], wait=10)):
            continue
        if ended[0].kind != "rollout.finished":
            raise SystemExit(f"rolled back: {ended[0].reason}")
        version = self._client.version(MODEL, self._dropped)
        found = {f"{job.stage}d": job.finished_at for job in version.jobs}
        waves = 0
        for event in self._client.events(seen, model=MODEL):
            name = {"version.recorded": "recorded", "rollout.started": "started", "rollout.finished": "finished"}
            if event.kind == "rollout.wave_assigned":
                waves += 1
                found[f"wave {waves} assigned"] = event.created_at
            elif event.kind in name:
                found[name[event.kind]] = event.created_at
        lives = [view.live_at for host in self._client.hosts() for view in host.assignments if view.live_at]
        for number, moment in enumerate(sorted(lives), 1):
            found[f"host {number} live"] = moment
        return {name: moment.timestamp() - complete for name, moment in found.items() if moment is not None}


def show(title: str, drops: list[Drop]) -> None:
    live = [drop.live for drop in drops]
    cuts = statistics.quantiles(live, n=100, method="inclusive")
    load = os.getloadavg()[0]
    print(f"\n{title}: {len(drops)} drops, 1-minute load {load:.1f} on {os.cpu_count()} cores")
    print(f"{'seconds after complete':<24}{'p50':>8}{'p95':>8}{'max':>8}")
    names = sorted(drops[0].phases, key=lambda name: statistics.median(drop.phases.get(name, 0.0) for drop in drops))
    for name in names:
        moments = [drop.phases[name] for drop in drops if name in drop.phases]
        at = statistics.quantiles(moments, n=100, method="inclusive")
        print(f"{name:<24}{at[49]:>8.2f}{at[94]:>8.2f}{max(moments):>8.2f}")
    print(f"{'both answer over HTTP':<24}{cuts[49]:>8.2f}{cuts[94]:>8.2f}{max(live):>8.2f}", flush=True)


def measure(folder: Path, lanes: list[str], drops: int, gap: float) -> None:
    with (
        stage.folder_bucket(folder / "drops") as bucket,
        stage.up(bucket, folder / "data", seconds=1800) as where,
        Client(where["registry"], data=where["data"]) as client,
    ):
        bench = Bench(client, where["hosts"], Path(where["folder"]))
        bench.prepare()
        for lane in lanes:
            show(lane, list(bench.lane(LANES[lane], drops, gap)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drops", type=int, default=20)
    parser.add_argument("--gap", type=float, default=8.0, help="seconds between two drops")
    parser.add_argument("--lane", choices=[*LANES], action="append", help="default: each in turn")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends `up` too
    with tempfile.TemporaryDirectory(prefix="wb-") as place:
        measure(Path(place), options.lane or list(LANES), options.drops, options.gap)


if __name__ == "__main__":
    main()
