"""Models and their versions: list, show, judge again, put away."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weighbridge.cli import asking, naming, output, session

if TYPE_CHECKING:
    from weighbridge.registry.schemas import Loss, Version, VersionDetail

PANEL = "Models"
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.", show_default=False)]
Selector = Annotated[str, typer.Argument(metavar="VERSION", help="A number, an alias, or latest.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask: for scripts.")]
Force = Annotated[bool, typer.Option("--force", help="Also where hosts are left with nothing to serve; asks nothing.")]
Reason = Annotated[str, typer.Option("--reason", "-m", help="Why; kept in the events.")]


def register(app: typer.Typer) -> None:
    for command in (models, versions, show, rejudge, archive, unarchive):
        app.command(rich_help_panel=PANEL)(command)


def models(context: typer.Context, json: session.Json = False) -> None:
    """List the models.

    Example: weighbridge models --json
    """
    with session.of(context).client() as client:
        found = list(client.models())
    if json:
        output.emit(found)
        return
    rows = ((m.name, m.latest, output.pairs(m.aliases), output.pairs(m.tags), m.created_at) for m in found)
    output.table(("model", "latest", "aliases", "tags", "created"), rows, empty="no models yet: drop a checkpoint")


def versions(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Only this model's.")] = None,
    status: Annotated[str | None, typer.Option(help="Only of this status: ready, rejected, quarantined …")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    json: session.Json = False,
) -> None:
    """List versions, newest first, with the reason of each verdict.

    Example: weighbridge versions digits --status rejected
    """
    with session.of(context).client() as client:
        found = list(islice(client.versions(model, status), limit))
        if not found and model is not None:
            naming.prove_known(client, model)
    if json:
        output.emit(found)
        return
    rows = ((f"{v.model} {v.number}", v.status, v.path, ", ".join(v.aliases), v.created_at, v.reason) for v in found)
    output.table(("version", "status", "checkpoint", "aliases", "created", "reason"), rows, empty="no versions")


def show(context: typer.Context, model: ModelName, version: Selector = "latest", json: session.Json = False) -> None:
    """Show one version whole: evidence, metrics, gates, files, jobs.

    Examples: weighbridge show digits; weighbridge show digits champion --json
    """
    with session.of(context).client() as client:
        found = client.version(model, version)
    if json:
        output.emit(found)
        return
    output.table(("", ""), _head(found))
    for title, columns, rows in _parts(found):
        if body := list(rows):
            output.console().print()
            output.table(columns, body, title=title)


def rejudge(
    context: typer.Context, model: ModelName, version: Selector, reason: Reason = "", json: session.Json = False
) -> None:
    """Judge an ended version anew, by the recipe and the sets that lie beside it now.

    Example: weighbridge rejudge digits 4 -m "the gate was too strict"
    """
    with session.of(context).client() as client:
        verdict(client.rejudge(model, version, reason), json=json)


def archive(
    context: typer.Context,
    model: ModelName,
    version: Selector,
    reason: Reason = "",
    yes: Yes = False,
    force: Force = False,
    json: session.Json = False,
) -> None:
    """Put a version away; a fleet that serves it goes back to the one before. `unarchive` brings it back.

    Asks first where hosts or aliases lose it. Refused where hosts would be left with nothing.

    Example: weighbridge archive digits 2 -m "trained on the wrong split"
    """
    with session.of(context).client() as client:
        if not yes and not force:
            lost = client.archive_loss(model, version)
            if lost.hosts or lost.aliases:
                asking.confirm(f"{_lost(lost)}. Archive {model} {version} all the same?", refused=lost.leaves_nothing)
        verdict(client.archive(model, version, reason, force=force), json=json)


def unarchive(
    context: typer.Context, model: ModelName, version: Selector, reason: Reason = "", json: session.Json = False
) -> None:
    """Give an archived version back the status that it had; it serves again where nothing took its place.

    Example: weighbridge unarchive digits 2 -m "it was the right split"
    """
    with session.of(context).client() as client:
        verdict(client.unarchive(model, version, reason), json=json)


def _lost(lost: Loss) -> str:
    """What a person should know before they say yes."""
    hosts = f"{output.counted(len(lost.hosts), 'host')} ({', '.join(lost.hosts)}) will serve " if lost.hosts else ""
    instead = f"version {lost.champion}" if lost.champion is not None else "nothing"
    named = f"it is {', '.join(lost.aliases)}" if lost.aliases else ""
    return "; ".join(filter(None, (hosts and hosts + instead, named)))


def verdict(version: Version, *, json: bool) -> None:
    """Print where a version stands, in one line."""
    if json:
        output.emit(version)
        return
    reason = f": {version.reason}" if version.reason else ""
    output.line(f"{version.model} {version.number} is {version.status}{reason}")


def _head(v: VersionDetail) -> Iterator[tuple[str, Any]]:
    yield "version", f"{v.model} {v.number}"
    yield "status", v.status
    yield "reason", v.reason
    yield "checkpoint", v.path
    yield "complete by", " ".join(filter(None, (v.proof, v.proof_reason, "(unproven)" if v.unproven else "")))
    yield "size", output.size(v.size)
    yield "source digest", v.source_digest
    yield "weights", v.weights
    if v.duplicate_of is not None:
        yield "duplicate of", v.duplicate_of
    yield "weights written", v.written_at
    if "held" in v.facts and "champion" not in v.aliases:
        yield "held", v.facts["held"]
    yield "aliases", ", ".join(v.aliases)
    yield "tags", output.pairs(v.tags)
    for name, value in sorted(v.metadata.items()):
        yield f"publisher says: {name}", value
    for name, value in sorted(v.file_metadata.items()):
        yield f"files say: {name}", value
    yield "created", v.created_at
    for name, value in v.evidence.items():
        yield f"evidence: {name}", value
    for note in v.facts.get("notes", ()):
        yield "note", note
    for ignored in v.recipe_ignored:
        yield "recipe ignored", ignored


def _parts(v: VersionDetail) -> Iterator[tuple[str, tuple[str, ...], Iterator[tuple[Any, ...]]]]:
    yield (
        "Variants",
        ("variant", "status", "artifact", "reason"),
        ((x.name, x.status, x.artifact_digest, x.reason) for x in v.variants),
    )
    yield (
        "Metrics",
        ("variant", "metric", "value", "unit", "slice"),
        ((x.name, m.name, m.value, m.unit, m.slice) for x in v.variants for m in x.metrics),
    )
    yield (
        "Gates",
        ("variant", "gate", "verdict", "observed", "limit", "reason"),
        ((x.name, g.gate, g.verdict, g.observed, g.limit, g.reason) for x in v.variants for g in x.gates),
    )
    yield "Files", ("file", "size", "digest"), ((f.key, output.size(f.size), f.digest) for f in v.files)
    yield (
        "Jobs",
        ("stage", "state", "verdict", "attempt", "started", "reason"),
        ((j.stage, j.state, j.verdict, f"{j.attempt}/{j.max_attempts}", j.started_at, j.reason) for j in v.jobs),
    )
