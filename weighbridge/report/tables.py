"""The tables of a report: every figure of every picture, and what no picture shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from weighbridge.registry.schemas import Metric, Variant, VariantBenchmark
from weighbridge.report import words
from weighbridge.report.layers import Noise
from weighbridge.report.quality import Classes
from weighbridge.report.subject import OUTPUT, Device, Subject, metric, serving_row
from weighbridge.report.words import NOTHING

_BAD = ("rejected", "failed", "quarantined", "invalid_noisy", "silent")


@dataclass(frozen=True)
class Column:
    """`number`: aligned by its end. `status`: coloured by what it says."""

    title: str
    number: bool = False
    status: bool = False


@dataclass(frozen=True)
class Table:
    """Cells are text as it came; the template escapes them. `folded`: long, and opened by a click."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    folded: bool = False


def _table(caption: str, columns: str, rows: Iterable[Sequence[str]], *, folded: bool = False) -> Table:
    """Of columns as `variant | status! | size#`: # are numbers, ! a status."""
    heads = [name.strip() for name in columns.split("|")]
    made = [Column(head.rstrip("#!"), head.endswith("#"), head.endswith("!")) for head in heads]
    return Table(caption, made, list(rows), folded)


def tone(text: str) -> str:
    """The class of a status's cell."""
    if text in _BAD or text == "slower":
        return "bad"
    return "good" if text in ("ready", "passed", "valid", "faster", "live") else "plain"


def variants(subject: Subject) -> Table:
    """Every variant with what became of it."""
    base = subject.original_size
    rows = (
        (
            one.name,
            one.status,
            words.size(one.size or None),
            words.percent(one.size / base if base and one.size else None),
            _kept(one),
            _drift(one),
            one.reason or NOTHING,
        )
        for one in subject.variants
    )
    columns = "variant | status! | size# | of original# | kept (bound)# | drift | why"
    return _table("Variants: what was built, and the verdicts", columns, rows)


def _kept(one: Variant) -> str:
    share, bound = metric(one, "kept"), metric(one, "kept_bound")
    if share is None:
        return NOTHING
    return words.percent(share, 2) + (f" ({words.percent(bound, 2)})" if bound is not None else "")


def _drift(one: Variant) -> str:
    names = (("top1", "top-1"), ("kl_mean", "KL"), ("cosine", "cosine"), ("max_abs", "max"))
    said = [f"{shown} {value:.3g}" for name, shown in names if (value := metric(one, name)) is not None]
    others = [f"{row.slice.removeprefix(OUTPUT)} error {row.value:.3g}" for row in one.metrics if _of_output(row)]
    return ", ".join([*said[:3], *others]) or NOTHING


def _of_output(row: Metric) -> bool:
    """Of an output that no metric reads."""
    return row.name == "error" and row.slice.startswith(OUTPUT)


def speeds(device: Device) -> Table:
    """The headline of each variant on one kind of hardware; what is a fact on any machine comes first."""
    rows = (
        (
            variant,
            one.finding or NOTHING,
            ("same" if one.finding == "same" else words.times(one.speedup))
            + words.interval(one.speedup_low, one.speedup_high),
            words.times(one.throughput_ratio) + words.interval(one.throughput_low, one.throughput_high),
            _marked(words.time(one.p50), one.contended),
            _marked(words.time(one.p99), one.contended),
            _marked(words.rate(one.throughput), one.contended),
            words.size(one.memory),
            words.time(one.load_seconds),
            NOTHING if one.energy is None else f"{1e3 * one.energy:.3g} mJ",
            words.percent(one.spread),
            one.contended or NOTHING,
        )
        for variant, one in device.facts.items()
    )
    columns = (
        "variant | finding! | latency ×# | throughput ×# | p50# | p99# | rows/s# | memory# | load# | energy/row# |"
    )
    caption = "Measured, each beside the original in one run. * beside other work: only ratios and memory are facts"
    return _table(caption, f"{columns} spread# | beside", rows)


def _marked(figure: str, contended: str) -> str:
    return f"{figure} *" if contended and figure != NOTHING else figure


def percentiles(device: Device) -> Table:
    rows = (
        (variant, row.mode, f"{row.count:,}", *map(words.time, (row.p50, row.p90, row.p95, row.p99, row.mean)))
        for variant, one in device.facts.items()
        if (row := serving_row(one))
    )
    columns = "variant | mode | requests# | p50# | p90# | p95# | p99# | mean#"
    return _table("Latency of one request at a time", columns, rows)


def every_row(device: Device) -> Table:
    """Everything that was measured: scenarios, modes, batches, callers, rates."""
    rows = (
        (
            variant,
            row.scenario.replace("_", " "),
            row.mode.replace("_", " "),
            str(row.batch),
            str(row.concurrency),
            NOTHING if row.rate is None else words.rate(row.rate),
            _marked(words.time(row.p50), row.contended),
            _marked(words.time(row.p99), row.contended),
            _marked(words.rate(row.throughput), row.contended),
            words.times(row.ratio) + words.interval(row.low, row.high),
            row.finding or NOTHING,
        )
        for variant, one in device.facts.items()
        for row in one.rows
    )
    columns = "variant | scenario | mode | batch# | callers# | requests/s# | p50# | p99# | rows/s# | × original# |"
    return _table("Every scenario, mode, batch and number of callers", f"{columns} finding!", rows, folded=True)


def gates(subject: Subject) -> Table:
    rows = (
        (one.name, gate.gate, gate.verdict, words.number(gate.observed), words.number(gate.limit), gate.reason)
        for one in subject.variants
        for gate in one.gates
    )
    return _table("Every gate, with what it saw", "variant | gate | verdict! | observed# | limit# | in words", rows)


def spoilt(measured: Sequence[VariantBenchmark]) -> Table:
    rows = (
        (one.variant, str(one.hardware.get("label", one.kind)), one.status, one.reason, words.moment(one.measured_at))
        for one in measured
    )
    columns = "variant | hardware | status! | why | when"
    return _table("Not measured: the machine was too busy to compare anything; in no picture", columns, rows)


def choices(subject: Subject) -> Table:
    rows = (
        (
            one.label or one.kind or "every other kind",
            one.variant,
            one.reason,
            ", ".join(one.front) or NOTHING,
            "yes" if one.measured else "no",
        )
        for one in subject.choices
    )
    columns = "hosts | get | because | Pareto front | measured there"
    return _table("What each kind of host is to get of it, as measured until now", columns, rows)


def serving(subject: Subject) -> Table:
    """What the hosts themselves say, of whichever version: no choice is served yet, and a silent host said it once."""
    rows = [
        (
            host.name,
            str(host.device.get("label") or host.device.get("device") or NOTHING),
            f"{slot.version}" + (" (this one)" if slot.version == subject.version.number else ""),
            slot.variant,
            "silent" if host.silent else slot.state,
            NOTHING if host.silent_seconds is None else f"{host.silent_seconds:.0f} s ago",
        )
        for host in subject.hosts
        for held in host.assignments
        if held.model == subject.version.model
        for slot in (held.observed.slots if held.observed else ())
    ]
    columns = "host | hardware | version | variant | state! | last heard#"
    return _table("What serves where, as the hosts report it", columns, rows)


def noise(seen: Noise, subject: Subject) -> list[Table]:
    """By variant in short, and every tensor."""
    rows = []
    for variant, values in seen.values.items():
        low, name = min((value, name) for name, value in values.items())
        unchanged = sum(row.action == "kept" for row in subject.tensors[variant])
        middle = words.decibel(median(values.values()))
        rows.append((variant, str(len(values)), str(unchanged), middle, words.decibel(low), name))
    columns = "variant | tensors compared# | kept as they were# | median dB# | lowest dB# | of"
    heads = [Column("tensor"), *(Column(variant, number=True) for variant in seen.values)]
    every = _matrix(seen.names, seen.values, words.decibel)
    return [_table("SQNR by variant", columns, rows), Table("SQNR of every tensor, in dB", heads, every, folded=True)]


def classes(seen: Classes) -> Table:
    found = _matrix(seen.names, seen.f1, lambda value: NOTHING if value is None else f"{value:.4f}")
    rows = [
        (*row, f"{seen.support[name]:,.0f}" if name in seen.support else NOTHING)
        for name, row in zip(seen.names, found, strict=True)
    ]
    heads = [Column("class"), *(Column(variant, number=True) for variant in seen.f1), Column("rows", number=True)]
    return Table("F1 by class", heads, rows, folded=len(seen.names) > 12)


def _matrix(
    names: Sequence[str], values: Mapping[str, Mapping[str, float]], said: Callable[[float | None], str]
) -> list[tuple[str, ...]]:
    return [(name, *(said(column.get(name)) for column in values.values())) for name in names]


def environment(device: Device) -> Table:
    """How each measurement was taken."""
    rows = []
    for variant, one in device.facts.items():
        seen = one.environment
        rows.append(
            (
                variant,
                words.pairs(dict(seen.get("versions", {}))),
                str(seen.get("threads", NOTHING)),
                str(seen.get("inputs", NOTHING)),
                str(seen.get("rounds", NOTHING)),
                words.percent(one.spread),
                _contention(dict(seen.get("contention") or {})),
                f"{one.source or NOTHING}, {words.moment(one.measured_at)}",
            )
        )
    columns = "variant | versions | threads# | inputs | rounds# | A/A spread# | worst contention | where and when"
    return _table(f"On {device.label.split(',')[0]}", columns, rows)


def _contention(seen: Mapping[str, object]) -> str:
    shares = ("others", "steal", "pressure")
    said = [f"{name} {value:.1%}" for name in shares if isinstance(value := seen.get(name), int | float)]
    if isinstance(switches := seen.get("switches"), int | float):
        said.append(f"{switches:.0f} switches/s")
    return ", ".join(said) or NOTHING


def notes(device: Device) -> list[str]:
    """What a measurement left out, or could not show, and why."""
    said = {variant: [*one.environment.get("notes", ()), one.reason] for variant, one in device.facts.items()}
    return [f"{variant}: {note}" for variant, notes in said.items() for note in notes if note]
