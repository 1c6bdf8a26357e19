"""What commands say where no person looks: one line a message, whole cells, nothing drawn, whatever the window."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from weighbridge.cli import main, output, session
from weighbridge.cli.app import app
from weighbridge.cli.exits import Exit
from weighbridge.registry import errors
from weighbridge.workers import benchmark, compress, evaluate, validate
from weighbridge.workers.compression import command as packing

LONG = "/".join(["a folder whose name is long"] * 40) + "/model [red].safetensors"
WINDOWS = [{"COLUMNS": "40"}, {"COLUMNS": "200", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true"}]


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group with its path."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


EVERY = list(commands(typer.main.get_command(app)))
ASKING = [(path, c) for path, c in EVERY if path and not hasattr(c, "commands")]
"""The commands that do something."""
ALONE = {"up", "daemon", "worker", "registry", "host", "demo", "push", "doctor", "config", "benchmark", "add"}
"""They ask no registry, or something else first."""
CALLING = [(path, c) for path, c in ASKING if not ALONE & set(path)]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder without settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WEIGHBRIDGE_CONFIG", raising=False)


@pytest.fixture(params=WINDOWS, ids=lambda window: window["COLUMNS"])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that must not matter."""
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


ANY_WINDOW = pytest.mark.usefixtures("window")


def said_in_one_line(capsys: pytest.CaptureFixture[str], program: str = "weighbridge") -> str:
    """The one plain line on stderr."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert err.startswith(f"{program}: ")
    assert not re.search("[\x1b\u2500-\u257f]", err), err
    return err


def filled(command: Any) -> list[str]:
    """Something for every parameter that a command insists on."""
    required = [p for p in command.params if p.required]
    options = [text for p in required if p.param_type_name == "option" for text in (p.opts[0], "x=FP32[1]")]
    return [*options, *("1" for p in required if p.param_type_name == "argument")]


@ANY_WINDOW
@pytest.mark.parametrize(("path", "command"), EVERY, ids=lambda value: " ".join(value) if type(value) is tuple else "")
def test_wrong_usage_of_every_command_is_one_line(
    path: tuple[str, ...], command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It quotes what was wrong whole, however long, and says where to read on: options, arguments, values."""
    assert main([*path, f"--{LONG}"]) == Exit.USAGE
    line = said_in_one_line(capsys)
    assert LONG in line
    assert f"(see {' '.join(('weighbridge', *path))} --help)" in line


@pytest.mark.parametrize(("path", "command"), ASKING, ids=lambda value: " ".join(value) if type(value) is tuple else "")
def test_wrong_values_of_every_command_are_one_line(
    path: tuple[str, ...], command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """One argument too many, none at all, words where a number belongs."""
    assert main([*path, *filled(command), *["1"] * 9, LONG]) == Exit.USAGE
    assert LONG in said_in_one_line(capsys)
    if any(p.required for p in command.params):
        assert main(path) == Exit.USAGE
        assert "Missing" in said_in_one_line(capsys)
    numbers = [p.opts[0] for p in command.params if p.type_descriptor.annotation in (int, float)]
    for option in filter(lambda name: name.startswith("--"), numbers):
        assert main([*path, option, LONG, *filled(command)]) == Exit.USAGE
        assert option in said_in_one_line(capsys)


@ANY_WINDOW
@pytest.mark.parametrize("json", [[], ["--json"]], ids=["tables", "json"])
@pytest.mark.parametrize(
    ("path", "command"), CALLING, ids=lambda value: " ".join(value) if type(value) is tuple else ""
)
def test_what_a_registry_refuses_is_one_line(
    path: tuple[str, ...],
    command: Any,
    json: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its words whole, also where they quote a line end."""

    def refuse(_: session.Session) -> None:
        raise errors.Conflict(f"{LONG} is\n  taken")

    monkeypatch.setattr(session.Session, "client", refuse)
    assert main([*path, *filled(command), *json]) == Exit.REFUSED
    assert f"{LONG} is; taken" in said_in_one_line(capsys)


@ANY_WINDOW
def test_what_a_store_and_settings_refuse_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path of any length, a file that is not there, a value that a setting cannot have."""
    (tmp_path / "w.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    deep = tmp_path / "/".join(["d" * 60] * 8)
    for arguments, words in (
        (["push", str(deep / "w.safetensors"), "--model", "m", "--store", str(tmp_path)], str(deep)),
        (["push", "w.safetensors", "--model", "m", "--store", str(deep)], str(deep)),
        (["--config", str(deep / "weighbridge.toml"), "models"], str(deep)),
        (["--set", f"registry.port={LONG}", "config"], "registry.port"),
        (["benchmark", "import", str(deep)], str(deep)),
    ):
        assert main(arguments) in Exit
        assert words in said_in_one_line(capsys)


@ANY_WINDOW
@pytest.mark.parametrize("stage", [benchmark, compress, evaluate, validate])
def test_the_stages_commands_say_wrong_usage_in_one_line(stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m weighbridge.workers.…` too."""
    with pytest.raises(SystemExit, match="2"):
        stage.main([LONG, "--no-such-option", LONG])
    said_in_one_line(capsys, stage.__name__)


@pytest.mark.slow
def test_a_stages_command_says_what_is_missing_in_one_line(tmp_path: Path) -> None:
    """No traceback for a blob or a file that is not there."""
    for stage, arguments in (
        ("evaluate", ["d" * 64, "e" * 64, "--blobs", str(tmp_path / LONG)]),
        ("compress", ["d" * 64, "--method", "bf16", "--blobs", str(tmp_path / LONG)]),
        ("benchmark", [LONG, "--blobs", str(tmp_path / LONG)]),
    ):
        command = [sys.executable, "-m", f"weighbridge.workers.{stage}", *arguments]
        said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert said.returncode != 0
        assert said.stderr.count("\n") == 1, said.stderr
        assert said.stderr.startswith(f"weighbridge.workers.{stage}: ")


@ANY_WINDOW
def test_the_packing_command_says_errors_in_one_line(tmp_path: Path) -> None:
    """A file without tensors at a long path, and a method that there is not."""
    (tmp_path / ("d" * 200)).mkdir()
    empty = tmp_path / ("d" * 200) / "w.safetensors"
    empty.write_bytes(b"")
    for arguments, words in ((["--method", "int8-rows"], str(empty)), (["--method", LONG], LONG)):
        said = CliRunner().invoke(packing.app(), [str(empty), "--out", str(tmp_path / "out"), *arguments])
        assert said.exit_code != 0
        assert (said.stdout, said.stderr.count("\n")) == ("", 1)
        assert words in said.stderr


@ANY_WINDOW
def test_help_off_a_terminal_is_the_same_in_every_window(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain, an option with its whole explanation a line: `weighbridge show --help | grep VERSION`."""
    for path, command in EVERY:
        assert main([*path, "--help"]) == Exit.OK
        out = capsys.readouterr().out
        assert not re.search("[\x1b\u2500-\u257f]", out), path
        for parameter in (p for p in command.params if p.help):
            assert " ".join(parameter.help.split()) in out, (path, parameter.name)


@ANY_WINDOW
def test_a_cell_is_whole_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Of any length, with markup, line ends and escapes as they are; a row is a line."""
    rows = [(LONG, 1.5), ("two\nlines \x1b[31mred", None)]
    output.table(("path", "value"), rows, title=f"of [bold]{LONG}")
    output.note(LONG)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert [LONG in line for line in out.splitlines()] == [True, False, True, False]
    assert "two\\nlines \\x1b[31mred" in out
    assert err == LONG + "\n"


def test_at_a_terminal_help_is_drawn_and_errors_are_not() -> None:
    """Panels for people; an error is the same plain line in both places."""
    keeper, tty = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "weighbridge.cli"]
    try:
        subprocess.run([*command, "alias", "--help"], stdout=tty, env=environment, timeout=60, check=True)
        assert "\u2500" in os.read(keeper, 100_000).decode(errors="replace")
        subprocess.run([*command, "modls"], stderr=tty, env=environment, timeout=60, check=False)
        assert os.read(keeper, 100_000).startswith(b"weighbridge: No such command 'modls'.")
    finally:
        os.close(tty)
        os.close(keeper)
