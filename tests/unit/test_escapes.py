"""Names and reasons of others never steer a terminal or forge a line of a log; JSON stays the value that it is."""

from __future__ import annotations

import json
import logging
import re
import unicodedata

import pytest

from weighbridge import escapes, logs, terminal
from weighbridge.cli import output
from weighbridge.logs import HumanFormatter, JsonFormatter, Redact

ESCAPES = {
    "ANSI": "a\x1b[31mred\x1b[0m",
    "title": "a\x1b]0;owned\x07",
    "C1": "a\x9b31mred",
    "newline": "a\n13:08:01.250Z INFO    weighbridge.daemon: all is well",
    "return": "good\rbad!",
    "backspace": "bad\b\b\bgood",
    "bidi": "a\u202egpj.exe",
    "isolate": "a\u2066b\u2069",
    "line separator": "a\u2028b\u2029c",
    "next line": "a\x85b",
    "form feed": "a\x0bb\x0cc",
    "surrogate": "a\udcffb",
    "tag": "a\U000e0041b",
    "zero width": "a\u200bb\ufeffc",
    "NUL": "a\0b",
}
HOSTILE = pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES)
PLAIN = ["digits/run-1 ist größer", "数字 модель", "emoji 🚀", "tab is none"]


def steers(text: str) -> bool:
    """Whether a terminal would be told anything by it, beyond its line ends."""
    return any(unicodedata.category(one)[0] in "CZ" and one not in " \n" for one in text)


def record(message: str, *, exc: BaseException | None = None, **extra: object) -> logging.LogRecord:
    found = logging.LogRecord("weighbridge.x", logging.INFO, "f.py", 1, "saw %s", (message,), None)
    vars(found).update(extra)
    if exc is not None:
        found.exc_info = (type(exc), exc, None)
    return found


@HOSTILE
def test_a_line_is_one_line_and_steers_nothing(text: str) -> None:
    """Also text that looks like an escape already: what is shown says which character was there."""
    shown = escapes.line(text)
    assert shown.isprintable()
    assert "\n" not in shown
    assert shown != text


@pytest.mark.parametrize("text", PLAIN)
def test_what_steers_nothing_stays(text: str) -> None:
    """Letters of any script are no danger."""
    assert escapes.line(text) == escapes.lines(text) == escapes.in_json(text) == text


@HOSTILE
def test_a_terminal_gets_no_control(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By a line, an error, a note, a table's cell, title and heading, and a traceback."""
    terminal.line(f"version of {text}")
    terminal.lines(["one", text])
    terminal.error("weighbridge", f"no {text}")
    output.note(text)
    output.table(["path", "reason"], [["digits/a", text], [text, None]], title=f"of {text}")
    terminal.draw(["tensor"], [[text]], title=text)
    terminal.traceback(ValueError(text))
    shown = capsys.readouterr()
    assert not steers(shown.out + shown.err)
    told = [line for line in (shown.out + shown.err).splitlines() if "13:08:01" in line]
    assert all(not line.startswith("13:08:01") for line in told)
    assert len(shown.out.splitlines()) == 3 + 4 + 3, "a row is one line"


@HOSTILE
def test_json_is_exact_and_steers_nothing(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a program reads is what the registry said, whatever a terminal in between would have done."""
    output.emit({"reason": text, text: ["größer", 1]})
    out = capsys.readouterr().out
    assert not steers(out)
    assert out.count("\n") == 1
    assert json.loads(out) == {"reason": text, text: ["größer", 1]}
    assert "größer" in out


@HOSTILE
def test_a_log_line_for_people_is_one_line(text: str) -> None:
    """Its message, and an exception below it: no line but the first looks like one of ours."""
    formatter = HumanFormatter(Redact())
    for said in (formatter.format(record(text)), formatter.format(record("it", exc=ValueError(text)))):
        assert not steers(said)
        first, *rest = said.split("\n")
        assert re.match(r"\d\d:\d\d:\d\d\.\d{3}", first)
        assert all(line.startswith("    ") for line in rest)
    stack = record("it")
    stack.stack_info = f"Stack:\n{text}"
    assert all(line.startswith("    ") for line in formatter.format(stack).split("\n")[1:])


@HOSTILE
def test_a_log_line_for_programs_is_one_json_object(text: str) -> None:
    """With every text as it is, `extra` fields and the exception too."""
    said = JsonFormatter(Redact()).format(record(text, exc=ValueError(text), path=text))
    assert not steers(said)
    assert "\n" not in said
    read = json.loads(said)
    assert (read["message"], read["path"]) == (f"saw {text}", text)
    assert text in read["exception"]


def test_numbers_that_json_has_not_are_words_in_a_log() -> None:
    """A reader of JSON lines does not stop at one."""
    said = JsonFormatter(Redact()).format(record("it", share=float("nan"), most=float("inf"), count=3))
    read = json.loads(said, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (read["share"], read["most"], read["count"]) == ("nan", "inf", 3)


def test_what_setup_installs_escapes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In both formats, through the standard library's logging, warnings included."""
    kept = logging.root.handlers[:], logging.root.level
    try:
        for format in ("human", "json"):
            logs.setup("info", format)
            logging.getLogger("weighbridge.test").warning("saw %s", ESCAPES["ANSI"])
            for handler in logging.root.handlers:
                handler.flush()
            assert "\x1b" not in capfd.readouterr().err
    finally:
        logging.root.handlers[:], logging.root.level = kept
        logging.captureWarnings(False)


def test_an_unexpected_error_of_a_command_steers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The traceback that it is shown with, and the one line of the others."""

    def fail() -> int:
        raise RuntimeError(ESCAPES["ANSI"])

    with pytest.raises(SystemExit) as ended:  # and no exception that Python itself would print
        terminal.run("stage", fail)
    shown = capsys.readouterr().err
    assert ended.value.code == 1
    assert "\x1b" not in shown
    assert "in fail" in shown
