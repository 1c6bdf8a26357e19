"""Templates: programs that an operator registers once from trusted code, in this process."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weighbridge.cli import output, session
from weighbridge.cli.exits import Exit, Failed, needs
from weighbridge.workers.confined.environment import scrubbed

if TYPE_CHECKING:
    from weighbridge.engines import template as engines_template
    from weighbridge.engines.manifest import TensorSpec
    from weighbridge.registry.client import Client
    from weighbridge.registry.schemas import Template

group = typer.Typer(no_args_is_help=True, help="Programs from trusted code: add, list.")
_OPENS = 300.0
"""Seconds that a worker, too, may need to open a program on a busy machine."""
_INPUT = re.compile(r"(?P<name>[^=\s]+)=(?P<datatype>[A-Z0-9]+)\[(?P<shape>[-\d\s,]*)\]")


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="template", rich_help_panel="Models")


@group.command()
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The template's name, as recipes write it.")],
    reference: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function without arguments that makes the module; or path/to/file.py:FACTORY.",
        ),
    ],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="NAME=TYPE[SHAPE]",
            help="By the names of forward()'s parameters; -1 is free, in axis 0 the batch: 'pixels=FP32[-1,64]'.",
        ),
    ],
    outputs: Annotated[
        list[str] | None,
        typer.Option("--output", metavar="NAME", help="Keys of what forward() returns; of a plain tuple, in order."),
    ] = None,
    positional: Annotated[
        bool, typer.Option("--positional", help="Bind inputs in the order given, whatever forward() calls them.")
    ] = False,
    unread: Annotated[
        list[str] | None,
        typer.Option("--unread", metavar="PATTERN", help="Parameters that the program may leave unread: 'aux.*'."),
    ] = None,
    json: session.Json = False,
) -> None:
    """Export a module that this command imports and runs: your own code, not a bucket's. Weights are left out.

    It is tried on other lengths, values and batches, and refused if it is no pure function, or if a process that never
    imported your code cannot open it. What it takes is printed.

    Example: weighbridge template add digits-mlp train:build --input 'pixels=FP32[-1,64]' --output logits
    """
    specs = [parse_input(text) for text in inputs]
    with session.of(context).client() as client:
        built = build(reference, specs, tuple(outputs or ()), positional=positional, unread=tuple(unread or ()))
        must_open_elsewhere(built)
        added = upload_template(client, name, built)
    if json:
        output.emit(added)
        return
    tensors = output.counted(len(added.parameters), "tensor")
    output.line(f"template {name}: {tensors}, fingerprint {added.fingerprint[:16]}")
    for line in _contract(built):
        output.line(f"  {line}")


@group.command("list")
def listed(context: typer.Context, json: session.Json = False) -> None:
    """List the templates. Example: weighbridge template list"""
    with session.of(context).client() as client:
        found = list(client.templates())
    if json:
        output.emit(found)
        return
    rows = ((t.name, len(t.parameters), _specs(t.inputs), _specs(t.outputs), t.created_at) for t in found)
    output.table(("template", "tensors", "inputs", "outputs", "created"), rows, empty="no templates")


def register_template(
    client: Client, name: str, reference: str, inputs: list[TensorSpec], outputs: tuple[str, ...] = ()
) -> Template:
    """Build a template in this process and upload it. Raises Failed, TemplateError, RegistryError."""
    return upload_template(client, name, build(reference, inputs, outputs))


def build(
    reference: str,
    inputs: list[TensorSpec],
    outputs: tuple[str, ...],
    *,
    positional: bool = False,
    unread: tuple[str, ...] = (),
) -> engines_template.Template:
    """Build a template in this process. Raises Failed, TemplateError."""
    with needs("engine"):
        from weighbridge.engines import template

    return template.build(_make(reference), inputs, outputs, positional=positional, unread=unread)


def must_open_elsewhere(built: engines_template.Template) -> None:
    """Open it in a process that never imported the code that it was made of, as workers will. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="weighbridge-template-") as folder:
        path = Path(folder) / "program.pt2"
        path.write_bytes(built.pt2)
        command = [sys.executable, "-m", "weighbridge.engines.reopen", str(path), built.digest]
        try:
            ended = subprocess.run(
                command, env=scrubbed(threads=1), capture_output=True, text=True, timeout=_OPENS, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise Failed(f"the template does not open in a process of its own within {_OPENS:g} s") from exc
    if ended.returncode:
        from weighbridge import limits

        said = " ".join((ended.stdout or ended.stderr or f"exit code {ended.returncode}").split())
        why = "workers do not import your code: an operator that it registers is not there"
        raise Failed(f"the template does not open in a process of its own ({why}): {limits.cut(said, 500)}")


def upload_template(client: Client, name: str, built: engines_template.Template) -> Template:
    """Register a built template. Raises RegistryError."""
    with tempfile.TemporaryDirectory(prefix="weighbridge-template-") as folder:
        path = Path(folder) / f"{name.replace('/', '_')}.pt2"
        path.write_bytes(built.pt2)
        return client.add_template(
            name,
            path,
            fingerprint=built.fingerprint,
            parameters={key: value.model_dump(mode="json") for key, value in built.parameters.items()},
            inputs=[spec.model_dump(mode="json") for spec in built.inputs],
            outputs=[spec.model_dump(mode="json") for spec in built.outputs],
        )


def _contract(built: engines_template.Template) -> list[str]:
    from weighbridge.engines import tensors

    return [*tensors.told(built.inputs), *built.notes]


def parse_input(text: str) -> TensorSpec:
    """`pixels=FP32[-1,64]`. Raises typer.BadParameter."""
    from weighbridge.engines.manifest import TensorSpec

    found = _INPUT.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r}: write NAME=TYPE[SHAPE], as in pixels=FP32[-1,64]", param_hint="--input")
    shape = tuple(int(part) for part in found["shape"].split(",") if part.strip())
    return TensorSpec(name=found["name"], datatype=found["datatype"], shape=shape)


def _make(reference: str) -> Any:
    """The module that a factory makes; the working directory counts, as with `python -m`."""
    from weighbridge.engines.errors import LoadError
    from weighbridge.engines.factory import load_factory

    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = load_factory(reference)
        try:
            return factory()
        except Exception as exc:  # whatever their own code raises
            words = f"{reference} failed: {type(exc).__name__}: {exc}"
            raise Failed(f"{words} ({_where(exc)}); it is called without arguments") from exc
    except LoadError as exc:
        raise Failed(str(exc), Exit.NOT_FOUND if ":" in reference else Exit.USAGE) from exc
    finally:
        sys.path.remove(str(Path.cwd()))


def _where(error: Exception) -> str:
    """The last line of code that the error went through: theirs, or the call itself."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name} line {last.lineno}"


def _specs(specs: list[dict[str, Any]]) -> str:
    return ", ".join(f"{s['name']}={s['datatype']}{list(s['shape'])}".replace(" ", "") for s in specs)
