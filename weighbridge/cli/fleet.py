"""What goes on: the status of the whole, hosts, events."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from weighbridge.cli import naming, output, rollouts, session, telling
from weighbridge.cli.exits import Exit, Failed
from weighbridge.cli.versions import Force, Reason

if TYPE_CHECKING:
    from weighbridge.registry.client import Client
    from weighbridge.registry.schemas import Event, Host, ObservedSlot, Status

PANEL = "Fleet"


def register(app: typer.Typer) -> None:
    for command in (status, hosts, retire, events):
        app.command(rich_help_panel=PANEL)(command)


def status(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Of what waits, only this model's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many of those that wait to show.")] = 20,
    after: Annotated[str | None, typer.Option(help="Show the page of what waits behind this, as a page says.")] = None,
    json: session.Json = False,
) -> None:
    """Say what goes on, and what waits and why, the newest first, in pages.

    Example: weighbridge status --model digits --limit 100
    """
    with session.of(context).client() as client:
        seen = client.status()
        page = client.checkpoint_page(model, after=after, limit=limit)
    if json:
        output.emit(page if model or after else seen)
        return
    if after is None:
        _overview(seen)
    rows = ((f"{c.model}: {c.path}", c.state, c.updated_at, c.reason) for c in page.items)
    output.table(
        ("checkpoint", "state", "seen", "reason"),
        rows,
        title="Waiting or refused",
        empty="nothing waits or was refused",
    )
    if page.next is not None:
        of = f" of {seen.open_checkpoints:,}" if model is None else ""
        again = "".join(f" --{name} {value}" for name, value in (("model", model), ("after", page.next)) if value)
        output.note(f"{len(page.items)}{of} are shown; the next: weighbridge status{again}")
    if seen.rollouts and after is None:
        rollouts.table(seen.rollouts)


def _overview(seen: Status) -> None:
    counts = output.pairs(seen.versions) or "none"
    there = f"{output.counted(seen.models, 'model')}, {output.counted(seen.hosts, 'host')}"
    output.line(f"{there}; versions: {counts}; jobs: {output.pairs(seen.jobs) or 'none'}")
    for trouble in troubles(seen):
        output.line(trouble)
    if seen.set_aside:
        stuck = ((f"{one.model} {one.number}", one.path, one.reason) for one in seen.set_aside)
        title = "Set aside: `weighbridge rejudge MODEL VERSION` tries again"
        output.table(("version", "checkpoint", "reason"), stuck, title=title)


def troubles(seen: Status) -> Iterator[str]:
    """What is silent and what cannot be reached, a line each."""
    if seen.silent:
        named = ", ".join(f"{host.name} ({_for(host.seconds)})" for host in seen.silent)
        yield f"silent: {output.counted(len(seen.silent), 'host')}: {named}"
    for one in seen.away:
        yield f"unreachable: {one.store}, since {output.ago(one.since)}: {one.reason}"
    if seen.daemon_silent_seconds is None:
        yield "no daemon has been heard of: nothing that lands is looked at (`weighbridge daemon`)"
    elif seen.daemon_silent_seconds > 0:
        yield f"silent: the daemon, {_for(seen.daemon_silent_seconds)}: nothing that lands is looked at"


def _for(seconds: float | None) -> str:
    return "never heard" if seconds is None else f"for {seconds:.0f} s"


def hosts(context: typer.Context, json: session.Json = False) -> None:
    """List the hosts: what each should serve, and what it does.

    Example: weighbridge hosts
    """
    with session.of(context).client() as client:
        found = sorted(client.hosts(), key=lambda host: host.name)
    if json:
        output.emit(found)
        return
    columns = ("host", "state", "url", "labels", "hardware", "last heard", "serves")
    rows = ((h.name, state(h), h.url, output.pairs(h.labels), hardware(h), _heard(h), serves(h)) for h in found)
    output.table(columns, rows, empty="no hosts: start one with `weighbridge host`")


def retire(
    context: typer.Context,
    host: Annotated[str, typer.Argument(help="The host's name or id, from `hosts`.")],
    reason: Reason = "",
    force: Force = False,
    json: session.Json = False,
) -> None:
    """Take a host out for good: its token ends, rollouts no longer count on it. Refused for the last one that serves.

    Example: weighbridge retire gpu-7 -m "returned to the pool"
    """
    with session.of(context).client() as client:
        named = [known.id for known in client.hosts() if known.name == host and known.state != "retired"]
        if len(named) > 1:
            raise Failed(f"{len(named)} hosts are named {host}: give one of the ids {', '.join(named)}", Exit.REFUSED)
        gone = client.retire(named[0] if named else _by_id(client, host), reason, force=force)
    if json:
        output.emit(gone)
    else:
        output.line(f"{gone.name} is {gone.state}")


def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    after: Annotated[int | None, typer.Option(help="Only events behind this number.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-M", help="Only this model's.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind, as in version.ready; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Without --follow: the last so many.")] = 50,
    json: session.Json = False,
) -> None:
    """Print what changed, who or what did it, and why; --json prints one object a line.

    Examples: weighbridge events --follow; weighbridge events --after 120 --model digits
    """
    with session.of(context).client() as client:
        if follow:
            if model is not None and not naming.is_known(client, model):
                output.note(f"nothing of {model} is there yet: it is waited for")
            for event in client.watch(after, model=model, kinds=kind):
                _line(event, json=json)
            return
        found = list(_recent(client, after, limit, model=model, kinds=kind))
        if not found and model is not None:
            naming.prove_known(client, model)
        for event in found:
            _line(event, json=json)


def _by_id(client: Client, host: str) -> str:
    """Raises NotFound, with the name that is spelled most like it."""
    from weighbridge.registry.errors import NotFound
    from weighbridge.registry.spelling import nearest

    there = list(client.hosts())
    if host not in {one.id for one in there}:
        names = [name for one in there if one.state != "retired" for name in (one.name, one.id)]
        raise NotFound("host", host, nearest(host, names))
    return host


def _recent(
    client: Client, after: int | None, limit: int, *, model: str | None, kinds: list[str] | None
) -> Iterable[Event]:
    """The first `limit` events behind `after`; without it, the last ones."""
    filtered = bool(model or kinds)  # then only reading all of them tells which are the last
    start = after if after is not None else 0 if filtered else max(0, client.status().last_seq - limit)
    found: deque[Event] = deque(maxlen=limit if after is None else None)
    while page := client.events(start, model=model, kinds=kinds):
        found.extend(page)
        start = page[-1].seq
        if after is not None and len(found) >= limit:
            break
    return islice(found, limit)


def _line(event: Event, *, json: bool) -> None:
    if json:
        output.emit(event)
        return
    output.line(telling.line(event))


def state(host: Host) -> str:
    """As the registry keeps it, or that nothing is heard of the host."""
    return "silent" if host.silent else host.state


def _heard(host: Host) -> str:
    return "never" if host.silent_seconds is None else f"{host.silent_seconds:.0f} s ago"


def hardware(host: Host) -> str:
    """What it serves on, in words; the setting where that could not be described."""
    return str(host.device.get("label") or host.device.get("device") or "")


def serves(host: Host) -> str:
    """`digits: 3 as int8 live, 2 standby`; the original goes without saying. Of a silent host what it said last."""
    parts = []
    for assignment in host.assignments:
        slots = assignment.observed.slots if assignment.observed else []
        last = "was " if host.silent else ""
        states = ", ".join(f"{_named(slot)} {last}{slot.state}" for slot in slots) or "nothing yet"
        parts.append(f"{assignment.model}: {states}")
    return "; ".join(parts)


def _named(slot: ObservedSlot) -> str:
    return str(slot.version) if slot.variant == "original" else f"{slot.version} as {slot.variant}"
