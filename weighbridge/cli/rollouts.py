"""Rollouts: look at them, start them, decide."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weighbridge.cli import naming, output, session
from weighbridge.cli.versions import Force, ModelName, Reason

if TYPE_CHECKING:
    from weighbridge.registry.client import Verb
    from weighbridge.registry.schemas import Rollout

PANEL = "Fleet"
group = typer.Typer(
    no_args_is_help=True, help="Move fleets: list, show, start, pause, resume, abort, promote, approve."
)
Id = Annotated[int, typer.Argument(metavar="ID", help="The rollout's number, from `rollouts list`.")]
Settings = Annotated[
    list[str] | None, typer.Option("--with", metavar="NAME=VALUE", help="Override the recipe: bake=0, waves=[1].")
]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=PANEL)(rollback)
    app.add_typer(group, name="rollouts", rich_help_panel=PANEL)
    app.add_typer(group, name="rollout", hidden=True)


@group.command("list")
def listed(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Only this model's.")] = None,
    going: Annotated[bool, typer.Option("--going", help="Only those that have not ended.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    json: session.Json = False,
) -> None:
    """List rollouts, newest first. Example: weighbridge rollouts list digits --going"""
    with session.of(context).client() as client:
        found = list(islice(client.rollouts(model, going=going), limit))
        if not found and model is not None:
            naming.prove_known(client, model)
    if json:
        output.emit(found)
    else:
        table(found)


@group.command()
def show(context: typer.Context, rollout: Id, json: session.Json = False) -> None:
    """Show one rollout with its steps. Example: weighbridge rollouts show 3"""
    with session.of(context).client() as client:
        found = client.rollout(rollout)
    if json:
        output.emit(found)
        return
    table([found])
    output.console().print()
    rows = ((s.number, s.action, output.pairs(s.detail), s.actor, s.created_at) for s in found.steps)
    output.table(("step", "action", "detail", "actor", "when"), rows, empty="no steps yet")


@group.command()
def start(
    context: typer.Context,
    model: ModelName,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="A number or an alias; else the newest ready one.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="This variant for every host; else each kind gets what is measured best for it.")
    ] = None,
    settings: Settings = None,
    reason: Reason = "",
    json: session.Json = False,
) -> None:
    """Roll a version out, or other variants of the version that is served.

    Examples: weighbridge rollouts start digits 4 --with bake=60 -m "hotfix"; weighbridge rollouts start digits staging
    --variant onnx-int8-dynamic
    """
    with session.of(context).client() as client:
        started = client.start_rollout(model, version, variant=variant, settings=_wishes(settings), reason=reason)
    _tell(started, json=json)


def rollback(
    context: typer.Context,
    model: ModelName,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="A number or an alias; else the one that was served before.")
    ] = None,
    settings: Settings = None,
    reason: Reason = "",
    json: session.Json = False,
) -> None:
    """Roll an earlier version out again. What a rollout under way has moved goes back by `rollouts abort`.

    Examples: weighbridge rollback digits -m "wrong on sevens"; weighbridge rollback digits 3 --with bake=0
    """
    with session.of(context).client() as client:
        _tell(client.roll_back(model, version, settings=_wishes(settings), reason=reason), json=json)


def _wishes(settings: list[str] | None) -> dict[str, Any]:
    return dict(map(session.parse_setting, settings or ()))


def _decision(verb: Verb, text: str) -> None:
    """Add one of the four verbs that differ only in their name."""

    def decide(context: typer.Context, rollout: Id, reason: Reason = "", json: session.Json = False) -> None:
        with session.of(context).client() as client:
            _tell(client.decide(rollout, verb, reason, actor=_person()), json=json)

    group.command(verb, help=f'{text} Example: weighbridge rollouts {verb} 3 -m "why"')(decide)


@group.command()
def abort(
    context: typer.Context, rollout: Id, reason: Reason = "", force: Force = False, json: session.Json = False
) -> None:
    """End it; its hosts go back to what they served before. Refused where that may not be served any more.

    Example: weighbridge rollouts abort 3 -m "why"
    """
    with session.of(context).client() as client:
        _tell(client.decide(rollout, "abort", reason, actor=_person(), force=force), json=json)


_decision("pause", "Stop where it is; only `resume` or `abort` goes on.")
_decision("resume", "Go on with a paused rollout.")
_decision("promote", "Skip the rest of the bake.")
_decision("approve", "Let a rollout begin that waits for approval.")


def table(found: list[Rollout]) -> None:
    """Print rollouts in one table."""
    rows = (
        (r.id, r.model, r.number, shown(r.variants), r.from_number, r.status, f"{r.wave}/{len(r.waves)}",
         output.pairs(r.fleet), r.actor, r.created_at, r.reason)
        for r in found
    )  # fmt: skip
    columns = ("rollout", "model", "version", "variants", "from", "status", "wave", "fleet", "by", "started", "reason")
    output.table(columns, rows, empty="no rollouts")


def shown(variants: dict[str, str]) -> str:
    """`onnx-int8-dynamic (1 kind), original (others)`; only the name where every kind gets the same."""
    others = variants.get("", "")
    counts = Counter(name for kind, name in variants.items() if kind and name != others)
    parts = [f"{name} ({output.counted(count, 'kind')})" for name, count in sorted(counts.items())]
    return ", ".join([*parts, f"{others} (others)"]) if parts else others


def _tell(rollout: Rollout, *, json: bool) -> None:
    if json:
        output.emit(rollout)
        return
    reason = f": {rollout.reason}" if rollout.reason else ""
    output.line(f"rollout {rollout.id} of {rollout.model} {rollout.number} is {rollout.status}{reason}")


def _person() -> str:
    """Who decides, on an open registry: the user of this machine; elsewhere the token's name counts."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user, as in a container
        return ""
