"""`weighbridge doctor`: checks every part that the settings name, and says what to fix.

A check is a generator of findings; it raises what the part raises, and the message of that error is the finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from weighbridge import terminal
from weighbridge.cli import output, session
from weighbridge.cli.doctor.finding import Finding
from weighbridge.cli.exits import Exit, Failed
from weighbridge.cli.session import Session

Check = Callable[[Session], Iterator[Finding]]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Look after it")(doctor)


def doctor(
    context: typer.Context,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this part: storage, broker, database, registry, hosts; repeatable.")
    ] = None,
    json: session.Json = False,
) -> None:
    """Check storage, broker, database, registry and hosts; say what to fix. Exit 1 if anything is wrong.

    Example: weighbridge doctor --only storage --only broker
    """
    run = session.of(context)
    checks = _checks()
    if unknown := sorted(set(only or ()) - set(checks)):
        raise typer.BadParameter(f"no part {', '.join(unknown)}: choose from {', '.join(checks)}", param_hint="--only")
    findings = [
        found for part, check in checks.items() if not only or part in only for found in examine(part, check, run)
    ]
    ok = all(finding.ok for finding in findings)
    if json:
        output.emit({"ok": ok, "findings": [asdict(finding) for finding in findings]})
    else:
        rows = ((found.part, "ok" if found.ok else "failed", found.what, found.fix) for found in findings)
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
        yield Finding(part, False, Redact()(str(exc)), _advice(exc))


def _advice(error: Exception) -> str:
    """What usually cures a kind of error; the message itself says where."""
    from weighbridge.storage import errors

    match error:
        case Failed():
            return ""
        case errors.AccessDenied():
            return "check storage.s3.access_key and secret_key, and that their policy allows list, get, put and delete"
        case errors.BucketNotFound():
            return "create the bucket or folder, or correct storage.url"
        case errors.StorageFull():
            return "free space or raise the quota; waiting work goes on by itself"
        case errors.StorageUnavailable():
            return "check storage.s3.endpoint_url, and that the store runs"
        case ImportError():
            return "install the extra that the message names"
        case PermissionError():
            return "set WEIGHBRIDGE_TOKEN to a token that allows it (`weighbridge token create`)"
    return ""


def _checks() -> dict[str, Check]:
    from weighbridge.cli.doctor import services, store

    return {
        "storage": store.check,
        "broker": services.broker,
        "database": services.database,
        "registry": services.registry,
        "hosts": services.hosts,
    }
