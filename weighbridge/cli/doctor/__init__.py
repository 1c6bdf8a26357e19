"""`weighbridge doctor`: checks every part that the settings name, and says what to fix.

A check is a generator of findings; it raises what the part raises, and the message of that error is the finding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from weighbridge import terminal
from weighbridge.cli import output, session
from weighbridge.cli.doctor.advice import advice
from weighbridge.cli.doctor.finding import Finding
from weighbridge.cli.exits import Exit
from weighbridge.cli.session import Session

if TYPE_CHECKING:
    from weighbridge.cli.doctor.roles import Role

Check = Callable[[Session], Iterator[Finding]]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Look after it")(doctor)


def doctor(
    context: typer.Context,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this part: storage, broker, database, registry, hosts; repeatable.")
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(help="Ask of the stores only what this one needs: daemon, worker, registry, publish; repeatable."),
    ] = None,
    json: session.Json = False,
) -> None:
    """Check storage, broker, database, registry and hosts; say what to fix. Exit 1 if anything is wrong.

    The stores are asked for every call that this installation makes, on a scratch object. Where processes have keys of
    their own, name whose these are: a daemon's need not write.

    Beside a `weighbridge up` (in its folder, or with --data) it checks what that one uses.

    Examples: weighbridge doctor --only storage --only broker; weighbridge doctor --only storage --role daemon
    """
    logging.getLogger("weighbridge").addHandler(logging.NullHandler())  # what the parts warn of becomes findings
    asked = session.of(context)
    run = asked.beside_up()
    if run is not asked and not json:
        output.note(f"checking what `weighbridge up` uses: {run.config}")
    checks = _checks(_roles(role or ()))
    if unknown := sorted(set(only or ()) - set(checks)):
        raise typer.BadParameter(f"no part {', '.join(unknown)}: choose from {', '.join(checks)}", param_hint="--only")
    findings = [
        found for part, check in checks.items() if not only or part in only for found in examine(part, check, run)
    ]
    ok = all(finding.ok for finding in findings)
    if json:
        output.emit({"ok": ok, "findings": [asdict(finding) for finding in findings]})
    else:
        rows = ((found.part, found.state, found.what, found.fix) for found in findings)
        output.table(("part", "", "finding", "what to do"), rows)
    if not ok:
        raise typer.Exit(Exit.FAILED)


def examine(part: str, check: Check, run: Session) -> Iterator[Finding]:
    """All findings of one check; what it raises is the last one."""
    from weighbridge.logs import Redact

    try:
        yield from check(run)
    except Exception as exc:
        if not terminal.is_expected(exc):
            raise
        yield Finding(part, False, Redact()(str(exc)), advice(exc))


def _roles(names: Collection[str]) -> list[Role]:
    from weighbridge.cli.doctor.roles import Role

    if unknown := sorted(set(names) - set(Role)):
        raise typer.BadParameter(f"no role {', '.join(unknown)}: choose from {', '.join(Role)}", param_hint="--role")
    return [Role(name) for name in names]


def _checks(asked: Collection[Role] = ()) -> dict[str, Check]:
    from weighbridge.cli.doctor import services, store

    return {
        "storage": partial(store.check, only=asked),
        "broker": services.broker,
        "database": services.database,
        "registry": services.registry,
        "hosts": services.hosts,
    }
