"""The second act: variants of two models are built, judged and measured, and the hosts get what measured best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from weighbridge.cli.template import parse_input, register_template
from weighbridge.demo import ask, digits, trials
from weighbridge.demo.entries import ORIGINAL, Entry, fill
from weighbridge.demo.patience import Patience, Stuck, told, unfinished
from weighbridge.demo.stage import Bucket
from weighbridge.demo.trials import Trial
from weighbridge.registry.client import Client
from weighbridge.registry.client_feed import ENDED
from weighbridge.registry.schemas import Choice, Host, Slot, VariantBenchmark, VersionDetail

_LEAST_ACCURACY = 0.9
_PAUSE, _LONGEST = 0.5, 10.0
"""Seconds between two looks: at least, and at most while nothing happens."""
_QUIET = 15.0
"""Seconds without a line after which one says what goes on."""


@dataclass(frozen=True)
class Served:
    """What one host answers with of one model, and why it was given that."""

    host: str
    url: str
    model: str
    version: int
    variant: str
    accuracy: float
    reason: str
    right: bool

    def line(self) -> str:
        return (
            f"{self.host} serves {self.model} {self.version} as {self.variant}: {self.accuracy:.1%} right "
            f"({self.reason})"
        )


class Contest:
    """Both trials. `tell` gets a line for every change of a variant."""

    def __init__(self, client: Client, bucket: Bucket, scratch: Path) -> None:
        self._client, self._bucket, self._scratch = client, bucket, scratch
        self._seen: dict[Trial, VersionDetail] = {}
        self.tell: Callable[[str], None] = lambda line: None
        self._told = time.monotonic()
        self.entries = {
            (trial, name): Entry(trial.model, name, expected)
            for trial in trials.ALL
            for name, expected in ((ORIGINAL, "ready"), *((name, end) for name, (_, end) in trial.variants.items()))
        }

    def drop(self) -> None:
        """Register the second program; put recipes, evaluation and training sets; then the checkpoints."""
        inputs = [parse_input(f"{digits.INPUT}=FP32[-1,64]")]
        register_template(self._client, digits.CNN_TEMPLATE, digits.CNN_FACTORY, inputs, (digits.OUTPUT,))
        evaluation, training = self._scratch / "eval.safetensors", self._scratch / "train.safetensors"
        digits.write_evaluation_set(evaluation)
        digits.write_training_set(training)
        weights = {trial: trials.trained(trial) for trial in trials.ALL}  # before the first is measured
        for trial in trials.ALL:
            for file in (evaluation, training):
                self._bucket.write(f"{trial.model}/{file.name}", file.read_bytes())
            self._bucket.write(f"{trial.model}/recipe.yaml", trial.recipe.encode())
            self._bucket.write(trial.path, weights[trial])

    def until_settled(self, *, still: float, longest: float) -> None:
        """Wait until nothing more is to come of any variant, and no rollout goes on.

        It looks when something happened: who asks all the time disturbs what is measured. Raises Stuck with what did
        not end, when nothing has moved for `still` seconds, or after `longest`.
        """
        patience = Patience("building and measuring variants", still=still, longest=longest)
        cursor = self._client.status().last_seq
        while not (self._look() and self._fleet_settled()):
            going = [(whose, job) for version in self._seen.values() for whose, job in unfinished(version)]
            lines = tuple(told(whose, job) for whose, job in going)
            patience.look((cursor, lines), lines or (f"rollouts: {self._rollouts()}",))
            if time.monotonic() - self._told > _QUIET:
                running = [f"{job.stage} of {whose}" for whose, job in going if job.state == "running"]
                self._say(f"{', '.join(running) or 'a rollout'} goes on; {len(going) - len(running)} jobs wait")
            time.sleep(_PAUSE)
            happened = self._client.events(after=cursor, wait=_LONGEST)
            cursor = happened[-1].seq if happened else cursor

    def _rollouts(self) -> str:
        going = [f"{one.model} {one.number} is {one.status}: {one.reason}" for one in self._client.rollouts(going=True)]
        return "; ".join(going) or "none goes on, and the hosts do not yet serve what was chosen"

    def _say(self, line: str) -> None:
        self._told = time.monotonic()
        self.tell(line)

    def ask(self) -> list[Served]:
        """Ask every host, over HTTP, what it serves of each model and for the held-out digits."""
        hosts = sorted(self._client.hosts(), key=lambda host: host.name)
        with httpx.Client(timeout=60) as http:
            return [self._ask(http, host, trial) for trial in trials.ALL for host in hosts]

    def wrong(self) -> list[str]:
        """What is not as it has to be, of the variants themselves."""
        found = [f"{e.model} {e.variant} is {e.status or 'not there'}" for e in self.entries.values() if not e.right]
        for trial in trials.ALL:
            built = [e for e in self.entries.values() if e.model == trial.model and e.variant != ORIGINAL and e.size]
            found += [f"{trial.model} has only {len(built)} variants"] if len(built) < 4 else []
        return found

    def _look(self) -> bool:
        """Ask the registry once; return whether every version is ready and its variants are settled."""
        settled = [self._look_at(trial) for trial in trials.ALL]
        return all(settled)

    def _look_at(self, trial: Trial) -> bool:
        if (seen := self._seen.get(trial)) is None or seen.status not in ENDED or not seen.variants_settled:
            versions = (v for v in self._client.versions(trial.model) if v.path == trial.path)
            if (newest := next(versions, None)) is None:
                return False
            seen = self._seen[trial] = self._client.version(trial.model, newest.number)
            self._update(trial, seen, self._client.benchmarks(trial.model, newest.number))
        if seen.status in ENDED and seen.status != "ready":
            raise Stuck(f"{trial.path} is {seen.status} ({seen.reason}): it will have no variants")
        return seen.status == "ready" and seen.variants_settled

    def _update(self, trial: Trial, version: VersionDetail, measured: list[VariantBenchmark]) -> None:
        original = next((one.size for one in version.variants if one.name == ORIGINAL), 0) or version.size
        newest: dict[str, VariantBenchmark] = {}
        for one in sorted(measured, key=lambda one: one.status != "valid"):  # stable: facts first, newest first
            newest.setdefault(one.variant, one)
        for variant in version.variants:
            entry = self.entries.get((trial, variant.name))
            if entry is not None and fill(entry, variant, newest.get(variant.name), original):
                self._say(entry.line())

    def _fleet_settled(self) -> bool:
        """No rollout goes on, and every host was given what measurement chose."""
        if any(True for _ in self._client.rollouts(going=True)):
            return False
        return all(
            (slot := _live(host, trial.model)) is not None and slot.artifact == self._choice(trial, host).artifact
            for trial in trials.ALL
            for host in self._client.hosts()
        )

    def _choice(self, trial: Trial, host: Host) -> Choice:
        """What hosts of this one's kind get of the trial's version."""
        kind = host.device.get("kind", "")
        choices = {choice.kind: choice for choice in self._client.choices(trial.model, self._seen[trial].number)}
        return choices.get(kind) or choices[""]

    def _ask(self, http: httpx.Client, host: Host, trial: Trial) -> Served:
        choice = self._choice(trial, host)
        variant, artifact = ask.serving(http, host.url, trial.model)
        right = ask.accuracy(http, host.url, trial.model)
        faster = [e.variant for e in self.entries.values() if e.model == trial.model and e.finding == "faster"]
        chosen = choice.measured and (choice.variant != ORIGINAL or not faster)
        proven = (variant, artifact) == (choice.variant, choice.artifact) and right > _LEAST_ACCURACY
        number = self._seen[trial].number
        return Served(
            host.name, host.url, trial.model, number, variant, round(right, 4), choice.reason, chosen and proven
        )


def _live(host: Host, model: str) -> Slot | None:
    """What the host was given to serve of the model."""
    slots = (slot for view in host.assignments if view.model == model for slot in view.slots)
    return next((slot for slot in slots if slot.role == "live"), None)
