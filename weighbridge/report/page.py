"""From a subject to the page: what goes where. The template has the HTML, and escapes everything that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from weighbridge.report import card, layers, picture, quality, speed, tables, words
from weighbridge.report.picture import Look, Picture
from weighbridge.report.subject import Device, Subject
from weighbridge.report.tables import Table


@dataclass(frozen=True)
class Part:
    """A section: pictures beside their tables, then sentences."""

    id: str
    title: str
    lead: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    link: str = ""
    """A shorter title for the list of sections."""


def render(subject: Subject) -> str:
    """The whole page as HTML. The same subject gives the same text."""
    known = [one.name for one in subject.variants]
    known += sorted({one.variant for one in subject.measured} - set(known))
    styles = picture.looks(known)
    version = subject.version
    return _template().render(
        title=f"{version.model} {version.number}",
        version=version,
        head=_head(subject),
        parts=[_variants(subject, styles), *_devices(subject, styles), *_layers(subject, styles), *_judged(subject)],
        card=card.card(subject),
    )


def file_name(subject: Subject) -> str:
    """`MODEL-VERSION.html`, of letters that no file system minds."""
    model = "".join(c if c.isalnum() or c in "-_." else "_" for c in subject.version.model).lstrip(".") or "model"
    return f"{model}-{subject.version.number}.html"


@cache
def _template() -> Template:
    pages = Environment(
        loader=PackageLoader("weighbridge.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.globals["tone"] = tables.tone
    return pages.get_template("page.html.j2")


def _harmless(value: object) -> object:
    return words.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _head(subject: Subject) -> list[tuple[str, str]]:
    version = subject.version
    evidence = [name.replace("_", " ") for name, proven in version.evidence.items() if proven is True]
    return [
        ("reason", version.reason or words.NOTHING),
        ("digest (BLAKE3)", version.source_digest or words.NOTHING),
        ("size", words.size(version.size or None)),
        ("checkpoint", version.path or words.NOTHING),
        ("judged complete by", " ".join(filter(None, (version.proof, version.proof_reason))) or words.NOTHING),
        ("evidence", ", ".join(evidence) or "none"),
        ("aliases", ", ".join(version.aliases) or words.NOTHING),
        ("created", words.moment(version.created_at)),
        ("ready", words.moment(version.ready_at)),
    ]


def _variants(subject: Subject, styles: dict[str, Look]) -> Part:
    """What serves where, what was built, and what it keeps."""
    pictures, shown = [], [tables.variants(subject)]
    if subject.choices:
        shown.insert(0, tables.choices(subject))
    shown.insert(0, tables.serving(subject))
    if (kept := quality.kept(subject)) is not None:
        pictures.append(quality.quality_against_size(kept, styles))
    if (classes := quality.classes(subject)) is not None:
        pictures.append(quality.f1_by_class(classes, styles))
        shown.append(tables.classes(classes))
    lead = "" if subject.variants else "Nothing was built of this version."
    ignored = tuple(f"The recipe asked in vain for {one}" for one in subject.version.recipe_ignored)
    return Part("variants", "Variants", lead, tuple(pictures), tuple(t for t in shown if t.rows), ignored)


def _devices(subject: Subject, styles: dict[str, Look]) -> list[Part]:
    found = [_device(place, one, styles) for place, one in enumerate(subject.devices)]
    if not found:
        found = [Part("speed", "Speed", "No speed was measured: there is no valid benchmark of this version.")]
    if subject.spoilt:
        found.append(Part("spoilt", "Spoilt measurements", tables=(tables.spoilt(subject.spoilt),)))
    return found


def _device(place: int, device: Device, styles: dict[str, Look]) -> Part:
    name = f"kind{place}"
    drawn = [paint(name, device, styles) for paint in (speed.ratios, speed.latencies, speed.sweeps)]
    short = device.label.split(",")[0]
    lead = f"{device.label}; kind {device.kind}. Grey bands: by what the original differs from itself: no difference."
    return Part(
        name,
        f"Speed on {short}",
        lead,
        tuple(one for one in drawn if one is not None),
        (tables.speeds(device), tables.percentiles(device), tables.every_row(device)),
        link=short,
    )


def _layers(subject: Subject, styles: dict[str, Look]) -> list[Part]:
    seen = layers.noise(subject)
    if seen is None:
        return []
    lead = "How much of each layer's weights survived. Tensors that are exact, or of another shape, have no number."
    return [Part("layers", "Layers", lead, (layers.draw(seen, styles),), tuple(tables.noise(seen, subject)))]


def _judged(subject: Subject) -> list[Part]:
    found = []
    gates = tables.gates(subject)
    lead = "" if gates.rows else "No gate has judged this version or its variants."
    found.append(Part("gates", "Gates", lead, tables=(gates,) if gates.rows else ()))
    measured = tuple(tables.environment(device) for device in subject.devices)
    if measured:
        notes = tuple(note for device in subject.devices for note in tables.notes(device))
        lead = (
            "Each variant in a process of its own, the original in two beside it, in turn (A B C C B A), with no other "
            "job of Weighbridge on the machine. Ratios are medians of paired rounds; bars have their 99% interval."
        )
        found.append(Part("method", "How it was measured", lead, tables=measured, notes=notes))
    return found
