"""Bytes up and down: push a checkpoint into the watched bucket, download a version's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weighbridge import escapes
from weighbridge.cli import output, session
from weighbridge.cli.exits import Exit, Failed
from weighbridge.cli.versions import PANEL, ModelName, Selector, verdict

if TYPE_CHECKING:
    from rich.progress import Progress

    from weighbridge.registry.schemas import VersionDetail
    from weighbridge.storage.publish import PublishResult

GOOD = frozenset({"ready"})


def register(app: typer.Typer) -> None:
    for command in (push, download):
        app.command(rich_help_panel=PANEL)(command)


def push(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder of shards with their index.")],
    model: Annotated[str, typer.Option("--model", "-M", help="The model's name.")],
    name: Annotated[str | None, typer.Option(help="The checkpoint's name; else the file's, with the time.")] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where to (storage.url): s3://… or a folder; else where the registry says."),
    ] = None,
    golden: Annotated[Path | None, typer.Option(help="The author's golden: input.* and output.* tensors.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="Kept with the version; repeatable.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A tag of the version; repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the verdict; exit 1 unless it is ready.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Longest wait for the verdict.")] = None,
    json: session.Json = False,
) -> None:
    """Put a checkpoint into the watched bucket, complete at one moment. Credentials of a bucket are your own settings'.

    What can only be refused is refused before a byte is sent.

    Examples: weighbridge push model.safetensors --model digits --wait;
    weighbridge push out/ --model digits --metadata commit=1f3a9c --metadata run=42 --tag owner=ann
    """
    run = session.of(context)
    run.override(storage__url=store)
    from weighbridge.storage.publish import publish

    said, tags = _pairs(metadata, "--metadata"), _pairs(tag, "--tag")
    name = name or f"{path.resolve().stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    _find_store(run)
    target = run.settings.storage.open_models()
    with _bar(path.name, quiet=json) as told:
        result = publish(
            path, model, name, store=target, golden=golden, metadata=said, tags=tags,
            progress=lambda _, done, all: told(done, all),
        )  # fmt: skip
    judged = _await(run, result, timeout) if wait else None
    _tell(result, judged, json=json)
    if judged is not None and not json:
        _tell_approval(run, judged)
    if judged is not None and judged.status not in GOOD:
        raise typer.Exit(Exit.FAILED)


def download(
    context: typer.Context,
    model: ModelName,
    version: Selector = "champion",
    folder: Annotated[Path | None, typer.Option("--to", help="Folder to write into; else MODEL-VERSION.")] = None,
    variant: Annotated[str, typer.Option(help="Which variant.")] = "original",
    json: session.Json = False,
) -> None:
    """Download a version's files, verified by digest; a broken download goes on.

    Example: weighbridge download digits champion --to ./weights
    """
    target = folder or Path(f"{model}-{version}")
    with session.of(context).client() as client, _bars(quiet=json) as told:
        client.download(model, version, target, variant, told)
    if json:
        output.emit({"model": model, "version": version, "variant": variant, "folder": target})
    else:
        output.line(f"{model} {version} is in {target}")


def _find_store(run: session.Session) -> None:
    """Where the settings name no store, take the one that the registry watches into them; keys stay the user's own."""
    if ("storage", "url") in run.loaded.origins:
        return
    from weighbridge.registry.errors import Unavailable

    try:
        with run.client() as client:
            there = client.store()
    except Unavailable:
        if Path(run.settings.storage.url).is_dir():
            return  # nobody to ask, and the folder that is meant where nothing is said
        raise
    told: dict[tuple[str, ...], object] = {("storage", name): getattr(there, name) for name in ("url", "prefix")}
    told |= {("storage", "s3", name): getattr(there, name) for name in ("endpoint_url", "region", "path_style")}
    unsaid = {"__".join(path): value for path, value in told.items() if path not in run.loaded.origins}
    run.override(**unsaid)


def _await(run: session.Session, result: PublishResult, timeout: float | None) -> VersionDetail:
    from weighbridge.registry.errors import NothingToCome

    prefix = run.settings.storage.prefix.strip("/")
    path = f"{prefix}/{result.path}" if prefix else result.path
    with run.client() as client:
        try:
            return client.wait(result.model, path=path, timeout=timeout)
        except TimeoutError as exc:
            raise Failed(f"published, but {exc}", Exit.UNAVAILABLE) from exc
        except NothingToCome as exc:
            raise Failed(f"published, but {exc}") from exc


def _tell_approval(run: session.Session, judged: VersionDetail) -> None:
    """Say that what is ready is served only when a person approves."""
    with run.client() as client:
        for rollout in client.rollouts(judged.model, going=True):
            if (rollout.number, rollout.status) == (judged.number, "pending"):
                output.line(f"rollout {rollout.id} waits for approval: weighbridge rollouts approve {rollout.id}")


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    """`NAME=TEXT` as a mapping; no name twice. Raises typer.BadParameter."""
    found: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{text!r}: write NAME=TEXT, as in commit=1f3a9c", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        found[name] = value
    return found


def _tell(result: PublishResult, judged: VersionDetail | None, *, json: bool) -> None:
    if json:
        published = {"model": result.model, "name": result.name, "path": result.path, "digest": result.digest}
        output.emit(published | {"size": result.size, "version": judged})
        return
    files = output.counted(len(result.files), "file")
    output.line(f"{result.path} is published: {output.size(result.size)} in {files}")
    if judged is not None:
        verdict(judged, json=False)


@contextmanager
def _bar(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """One bar for all files; nothing where no person looks."""
    with _progress(quiet=quiet) as progress:
        task = progress.add_task(escapes.line(label), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _bars(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar a file."""
    with _progress(quiet=quiet) as progress:
        tasks: dict[str, object] = {}

        def told(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(escapes.line(name), total=total)
            progress.update(tasks[name], completed=done, total=total)  # type: ignore[arg-type]

        yield told


def _progress(*, quiet: bool) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    shown = output.console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=shown, disable=quiet or not shown.is_terminal)
