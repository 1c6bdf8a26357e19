"""What a rollout does next. Pure: no clock, no I/O; everything it knows is in its two arguments.

The order of the questions is the policy. Harm first (roll back), then what is missing (hold), then patience (wait), and
only then the next wave. A pause stops everything but an abort and the withdrawal of the version itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from weighbridge.registry.lifecycle import RolloutStatus
from weighbridge.registry.recipe import RolloutSettings
from weighbridge.workers.judge import NOTHING, Counts, Harm, Inconclusive, Old, Sample, judge


@dataclass(frozen=True, slots=True)
class SlotSeen:
    """What a host said of one slot."""

    artifact: str
    state: str
    golden: str = "unchecked"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class HostSeen:
    """A host of the fleet, or one that this rollout touched. Times are the database's seconds."""

    id: str
    silent: float
    """Seconds since its last call."""
    in_fleet: bool = True
    generation: int = 0
    """Of its assignment for this model; 0: it has none."""
    artifacts: tuple[str, ...] = ()
    """What the assignment wants there."""
    assigned_at: float = 0.0
    live_at: float | None = None
    """When it first reported this generation live."""
    observed_generation: int = 0
    slots: tuple[SlotSeen, ...] = ()
    """As reported, of `observed_generation`."""
    counts: Counts = NOTHING
    """Since its present assignment went live."""
    before: Counts = NOTHING
    """What it had counted when the rollout began; one that was given the new version: of what it served before."""
    wanted: str = ""
    """The artifact that this rollout gives a host of its kind."""
    back: str | None = None
    """The artifact that a roll back returns it to; None: empty slots."""
    holds: bool = False
    """Its assignment is already what this rollout would give it: another variant for others leaves it alone."""

    def slot(self, artifact: str) -> SlotSeen | None:
        """What it reported of `artifact` in the generation that it should hold."""
        if self.observed_generation != self.generation:
            return None
        return next((slot for slot in self.slots if slot.artifact == artifact), None)


@dataclass(frozen=True, slots=True)
class Observations:
    now: float
    hosts: tuple[HostSeen, ...]
    withdrawn: str = ""
    """Why the version, or a variant that this rollout gives, may not be served any more; empty while it may."""


@dataclass(frozen=True, slots=True)
class RolloutView:
    number: int
    status: RolloutStatus
    settings: RolloutSettings
    wave: int = 0
    """Waves assigned so far."""
    given: tuple[str, ...] = ()
    """Hosts that were given the new version, in that order."""
    promoted: int = 0
    """The wave whose bake a person cut short."""
    abort: str = ""
    """A person's wish to roll back, with the words; empty: none."""
    unreadable: str = ""
    """Why nobody knows any more how it should move; empty: its settings are what was stored."""


@dataclass(frozen=True, slots=True)
class Assign:
    """Give these hosts the new version; that makes `wave` waves."""

    wave: int
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until` unless something is reported; None: not before somebody decides."""

    until: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Hold:
    """It cannot go on by itself; it goes on when `missing` is there."""

    missing: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """Give every host in `hosts` the old version again."""

    reason: str
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """It is over: finished, rolled_back or aborted."""

    status: RolloutStatus
    reason: str = ""


Step = Assign | Wait | Hold | RollBack | Finish


def next_step(rollout: RolloutView, seen: Observations) -> Step:
    """Name the one next step of a rollout that has not ended."""
    if rollout.status is RolloutStatus.ROLLING_BACK:
        return _returning(rollout, seen)
    if reason := seen.withdrawn or rollout.abort:
        if rollout.given:
            return RollBack(reason, rollout.given)
        return Finish(RolloutStatus.ABORTED, reason)
    if rollout.status is RolloutStatus.PENDING:
        return Wait(None, "waits for approval")
    if rollout.status is RolloutStatus.PAUSED:
        return Wait(None, "paused")
    if rollout.unreadable:
        return Hold(rollout.unreadable)
    return _advance(rollout, seen)


def lost(rollout: RolloutView, seen: Observations) -> tuple[str, ...]:
    """The hosts that are silent for too long to count on: they leave the wave and are reported."""
    return tuple(host.id for host in seen.hosts if _lost(host, rollout.settings))


def _lost(host: HostSeen, settings: RolloutSettings) -> bool:
    return host.silent >= settings.lost_after


def _advance(rollout: RolloutView, seen: Observations) -> Step:
    settings = rollout.settings
    fleet = sorted((host for host in seen.hosts if host.in_fleet), key=lambda host: host.id)
    given = set(rollout.given)
    wave = [host for host in fleet if host.id in given and not _lost(host, settings)]
    rest = [host for host in fleet if host.id not in given]
    for host in wave:
        if harm := _broken(host, rollout, seen.now):
            return RollBack(harm, rollout.given)
    finding = judge(_samples(wave), _old(rest, wave), settings)
    if isinstance(finding, Harm):
        return RollBack(finding.reason, rollout.given)
    if missing := _missing(fleet, wave, rollout):
        return Hold(missing)
    if until := _not_before(wave, rollout, seen.now):
        return until
    if isinstance(finding, Inconclusive) and rollout.promoted < rollout.wave:
        return Hold(finding.missing)
    todo = [host for host in rest if not host.holds]
    if not todo:
        return Finish(RolloutStatus.FINISHED)
    return _next_wave(rollout, wave, len(fleet) - len(rest) + len(todo), todo)


def _samples(hosts: Sequence[HostSeen]) -> list[Sample]:
    return [Sample(host.id, host.counts) for host in hosts if host.live_at is not None]


def _old(rest: Sequence[HostSeen], wave: Sequence[HostSeen]) -> Old:
    """What the old version served: beside the wave since the rollout began, and on the wave's own hosts before."""
    beside = [host.counts - host.before for host in rest if host.live_at is not None and not host.holds]
    return Old(sum(beside, NOTHING), sum((host.before for host in wave), NOTHING))


def _live(host: HostSeen, artifact: str | None = None) -> bool:
    """Whether it serves `artifact` (None: what this rollout gives it), proven."""
    slot = host.slot(host.wanted if artifact is None else artifact)
    return slot is not None and slot.state == "live" and slot.golden == "passed"


def _broken(host: HostSeen, rollout: RolloutView, now: float) -> str:
    """Why this host of the wave condemns the version, or nothing."""
    slot = host.slot(host.wanted)
    if slot is not None and slot.golden == "failed":
        return f"host {host.id}: the reference golden failed: {slot.reason or 'outputs differ'}"
    if slot is not None and slot.state == "failed":
        return f"host {host.id}: version {rollout.number} did not load: {slot.reason or 'no reason given'}"
    waited = now - host.assigned_at
    if host.live_at is None and not _live(host) and waited >= rollout.settings.load_timeout:
        return f"host {host.id}: not live after {rollout.settings.load_timeout:g} s (load_timeout)"
    return ""


def _missing(fleet: Sequence[HostSeen], wave: Sequence[HostSeen], rollout: RolloutView) -> str:
    """What keeps the rollout from going on although nothing is wrong with the version. No numbers that grow."""
    settings = rollout.settings
    if not fleet:
        labels = ", ".join(f"{key}={value}" for key, value in sorted(settings.fleet.items()))
        return f"no host with labels {labels}" if labels else "no host is enrolled"
    silent = [host.id for host in fleet if _lost(host, settings)]
    if len(silent) > settings.max_lost:
        return (
            f"silent for {settings.lost_after:g} s or more: host {', '.join(silent)} "
            f"({len(silent)} lost, at most {settings.max_lost}); start or retire it"
        )
    if len(silent) == len(fleet):
        return f"no host answers: {', '.join(silent)}"
    again = [host.id for host in wave if host.live_at is not None and not _live(host)]
    if again:
        return f"host {', '.join(again)} was live with version {rollout.number} and is not now"
    return ""


def _not_before(wave: Sequence[HostSeen], rollout: RolloutView, now: float) -> Wait | None:
    """Until when to be patient: hosts that still load, then the bake of those that are live."""
    settings = rollout.settings
    loading = [host for host in wave if not _live(host)]
    if loading:
        deadline = min(
            min(host.assigned_at + settings.load_timeout, now + settings.lost_after - host.silent) for host in loading
        )
        return Wait(deadline, f"wave {rollout.wave}: {', '.join(host.id for host in loading)} not live yet")
    baked = max((host.live_at or now for host in wave), default=now) + settings.bake
    if wave and rollout.promoted < rollout.wave and now < baked:
        return Wait(baked, f"wave {rollout.wave} bakes")
    return None


def _next_wave(rollout: RolloutView, wave: Sequence[HostSeen], fleet: int, rest: Sequence[HostSeen]) -> Assign:
    """Fill up the present wave where hosts left it, else open the next that adds one; the last is the whole fleet.

    `fleet` counts the hosts that the rollout changes, given or in `rest`: the others prove nothing as canaries.

    A wave whose hosts all fell silent proved nothing: another host takes their place, until `max_lost` holds it.
    """
    waves = rollout.settings.waves
    answering = [host.id for host in _in_turn(rest, wave) if not _lost(host, rollout.settings)]
    for index in range(max(rollout.wave - 1, 0), len(waves) - 1):
        room = wave_size(waves[index], fleet) - len(wave)
        if 0 < room < len(rest) and answering:
            return Assign(index + 1, tuple(answering[:room]))
    return Assign(max(len(waves), 1), tuple(host.id for host in rest))


def _in_turn(rest: Sequence[HostSeen], wave: Sequence[HostSeen]) -> list[HostSeen]:
    """The hosts of each variant in turn, so that every variant has its canaries early; else in the order of ids."""
    counts = Counter(host.wanted for host in wave)
    turns: list[tuple[int, HostSeen]] = []
    for host in rest:
        turns.append((counts[host.wanted], host))
        counts[host.wanted] += 1
    return [host for _, host in sorted(turns, key=lambda turn: turn[0])]


def wave_size(wave: int | str, fleet: int) -> int:
    """How many hosts of a fleet of `fleet` have the new version after `wave`: a count, or a share rounded up."""
    if isinstance(wave, int):
        return min(wave, fleet)
    return -(-int(wave.removesuffix("%")) * fleet // 100)


def _returning(rollout: RolloutView, seen: Observations) -> Wait | Finish:
    """Wait until every host that was touched holds the old version again, is silent, or cannot."""
    settings = rollout.settings
    touched = [host for host in seen.hosts if host.id in rollout.given and not _lost(host, settings)]
    trouble: list[str] = []
    deadlines: list[float] = []
    for host in touched:
        if _returned(host):
            continue
        slot = host.slot(host.back) if host.back is not None else None
        deadline = host.assigned_at + settings.load_timeout
        if slot is not None and slot.state == "failed":
            trouble.append(f"host {host.id} could not load the old version: {slot.reason or 'no reason given'}")
        elif seen.now >= deadline:
            trouble.append(f"host {host.id} did not return within {settings.load_timeout:g} s (load_timeout)")
        else:
            deadlines.append(min(deadline, seen.now + settings.lost_after - host.silent))
    if deadlines:
        return Wait(min(deadlines), "rolling back")
    return Finish(RolloutStatus.ROLLED_BACK, "; ".join(trouble))


def _returned(host: HostSeen) -> bool:
    """A host without slots of a model reports nothing of it."""
    if host.back is not None:
        return _live(host, host.back)
    return all(slot.artifact != host.wanted for slot in host.slots)
