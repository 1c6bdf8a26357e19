"""The command line against a real registry, in this process."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fixtures.digits import Digits
from fixtures.house import MODEL, House

from weighbridge.cli import main, session
from weighbridge.cli.exits import Exit

RECIPE = "gates: [{metric: accuracy, min: 0.8}]\nrollout: {automatic: true, waves: [1, '100%'], bake: 0}\n"


class Terminal:
    """Runs commands and reads what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = Exit.OK) -> str:
        assert main(arguments) == code, self._capsys.readouterr().err
        out, err = self._capsys.readouterr()
        return out if code == Exit.OK else err

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def terminal(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Terminal:
    """A terminal whose registry is the house's."""
    for name in os.environ:
        if name.startswith("WEIGHBRIDGE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session.Session, "client", lambda _: nullcontext(house.client))
    return Terminal(capsys)


@pytest.mark.slow
def test_a_person_follows_a_checkpoint_through_the_terminal(
    house: House, digits: Digits, digits_linear: Any, terminal: Terminal, tmp_path: Path
) -> None:
    """Every look and every verb, as tables and as JSON."""
    from safetensors.numpy import save

    assert "no models yet" not in terminal("models")  # that is a note, on stderr
    house.register("digits-linear", digits_linear)
    house.put("recipe.yaml", RECIPE)
    house.put("eval.safetensors", save({"pixels": digits.held_out, "labels": digits.held_out_labels}))
    house.publish("monday", digits.train(rows=500))
    house.settle()
    house.publish("tuesday", digits.noise())
    house.put("broken.safetensors", b"\x10\0\0\0\0\0\0\0{")
    house.settle()

    assert terminal.json("models")[0]["aliases"] == {"champion": 1}
    assert [v["status"] for v in terminal.json("versions", MODEL)] == ["rejected", "ready"]
    assert "accuracy" in terminal("versions", MODEL, "--status", "rejected")
    shown = terminal("show", MODEL, "champion")
    assert "digits 1" in shown
    assert "Gates" in shown
    assert terminal.json("show", MODEL)["number"] == 2
    assert "no version" in terminal("show", MODEL, "9", code=Exit.NOT_FOUND)

    assert "broken.safetensors" in terminal("status")
    assert terminal.json("status")["versions"] == {"ready": 1, "rejected": 1}
    assert [host["name"] for host in terminal.json("hosts")] == ["left", "right"]
    assert "digits: 1 live" in terminal("hosts")
    assert terminal.json("template", "list")[0]["name"] == "digits-linear"

    (rollout,) = terminal.json("rollouts", "list", MODEL)
    assert rollout["status"] == "finished"
    assert "finish" in terminal("rollouts", "show", str(rollout["id"]))
    assert "finished" in terminal("rollouts", "pause", str(rollout["id"]), code=Exit.REFUSED)

    assert terminal.json("alias", "set", MODEL, "staging", "1")["number"] == 1
    assert "champion" in terminal("alias", "list", MODEL)
    terminal("alias", "set", MODEL, "champion", "2", code=Exit.REFUSED)
    terminal("alias", "delete", MODEL, "staging")

    assert "digits 2 is discovered" in terminal("rejudge", MODEL, "2", "-m", "once more")
    house.settle()
    assert terminal.json("archive", MODEL, "2", "-m", "noise")["status"] == "archived"  # nobody loses it: no question
    assert terminal.json("unarchive", MODEL, "2")["status"] == "rejected"
    asked = terminal("archive", MODEL, "champion", code=Exit.REFUSED)
    assert "leaves hosts left, right with nothing of digits" in asked
    assert "--force" in asked
    house.store.delete(f"{MODEL}/broken.safetensors")  # which may be older, and would be waited for
    house.publish("wednesday", digits.train(rows=1397))
    house.settle()
    asked = terminal("archive", MODEL, "champion", code=Exit.REFUSED)
    assert "2 hosts (left, right) will serve version 1; it is champion. Archive digits champion" in asked
    assert "say --yes" in asked
    assert "is archived: bad" in terminal("archive", MODEL, "champion", "--yes", "-m", "bad")
    house.settle()
    assert "2 hosts" in terminal("status")

    terminal("download", MODEL, "champion", "--to", "weights")
    assert (tmp_path / "weights/model.safetensors").stat().st_size > 0

    lines = [json.loads(line) for line in terminal("events", "--after", "0", "--limit", "3", "--json").splitlines()]
    assert [event["seq"] for event in lines] == [1, 2, 3]
    last = json.loads(terminal("events", "--json").splitlines()[-1])
    assert (last["kind"], last["reason"]) == ("alias.deleted", "version 3 was withdrawn: bad")  # of `previous`
    assert "version.archived" in terminal("events", "--kind", "version.archived", "--model", MODEL)


def test_tokens_and_hosts_come_and_go(house: House, terminal: Terminal) -> None:
    """A token is printed once; a host that is retired is named so."""
    token = terminal("token", "create", "viewer", "--name", "dashboard", "--days", "1").strip()
    row = terminal.json("token", "list")[0]
    assert (row["role"], row["name"]) == ("viewer", "dashboard")
    assert token not in terminal("token", "list")
    terminal("token", "revoke", str(row["id"]))
    assert terminal.json("token", "list")[0]["revoked_at"] is not None
    assert "no role" in terminal("token", "create", "king", code=Exit.REFUSED)
    house.settle()
    assert terminal.json("retire", "left", "-m", "gone")["state"] == "retired"
    terminal("retire", "nobody", code=Exit.NOT_FOUND)


_PROGRAM = """
import torch
from torch import nn

class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.aux = nn.Embedding(50, 4), nn.Linear(2, 2)

    def forward(self, ids, mask):
        if ids.shape[1] > 12:
            ids, mask = ids[:, -12:], mask[:, -12:]
        return {"sum": (self.tokens(ids) * mask[..., None]).sum(1), "first": self.tokens(ids)[:, 0]}

def build():
    return Program()
"""


@pytest.mark.slow
def test_adding_a_template_prints_what_it_takes(terminal: Terminal, tmp_path: Path) -> None:
    """Names in any order, the contract in words and as JSON, and refusals that say what exists and what to do."""
    (tmp_path / "program.py").write_text(_PROGRAM)
    inputs = ("--input", "mask=INT64[-1,-1]", "--input", "ids=INT64[-1,-1]")

    def add(name: str, *more: str) -> tuple[str, ...]:
        return ("template", "add", name, "program.py:build", *more)

    assert "--unread 'aux.weight'" in terminal(*add("small", *inputs), code=Exit.FAILED)
    assert "returns sum, first; there is no output logits" in terminal(
        *add("small", *inputs, "--output", "logits", "--unread", "aux.*"), code=Exit.FAILED
    )
    unknown = terminal(*add("small", "--input", "tokens=INT64[-1,-1]", "--unread", "aux.*"), code=Exit.FAILED)
    assert "takes ids, mask; there is no input tokens" in unknown
    said = terminal(*add("small", *inputs, "--output", "sum", "--unread", "aux.*"))
    assert "input ids: axis 1 is from 1 to 12 long" in said
    assert "input ids: values 0 to 49" in said
    assert "input mask: axis 1 is as long as axis 1 of ids" in said
    assert "forward() takes 13 too" in said
    added = terminal.json(*add("small", *inputs, "--output", "sum", "--unread", "aux.*"))
    assert [spec["name"] for spec in added["inputs"]] == ["ids", "mask"]
    assert added["inputs"][0]["lengths"] == [{"axis": 1, "maximum": 12}]
    assert added["inputs"][0]["values"] == {"minimum": [0], "maximum": [49]}
    assert [spec["name"] for spec in added["outputs"]] == ["sum"]


OF_OUR_OWN = """
import torch

@torch.library.custom_op("weighbridge_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2

doubled.register_fake(torch.empty_like)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, x):
        return doubled(self.fc(x))

def build():
    return Net()
"""


@pytest.mark.slow
def test_a_template_that_opens_nowhere_else_is_not_registered(
    house: House, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uses an operator that its own module registers, which no worker imports: said before it is uploaded."""
    (tmp_path / "own.py").write_text(OF_OUR_OWN)
    monkeypatch.chdir(tmp_path)
    before = terminal.json("template", "list")
    said = terminal("template", "add", "own", "own.py:build", "--input", "x=FP32[-1,4]", code=Exit.FAILED)
    assert "does not open in a process of its own" in said
    assert terminal.json("template", "list") == before


def test_what_waits_is_shown_in_pages(house: House, terminal: Terminal) -> None:
    """Each with its reason, the newest first; a page says how many there are and how to see the next."""
    for number in range(5):
        house.put(f"{number}.safetensors", b"x")
    house.settle()
    page = terminal.json("status", "--model", MODEL, "--limit", "2")
    assert [row["path"].rpartition("/")[2] for row in page["items"]] == ["4.safetensors", "3.safetensors"]
    assert all("1 of" in row["reason"] for row in page["items"])
    assert terminal.json("status")["open_checkpoints"] == 5
    assert "4.safetensors" in terminal("status", "--limit", "2")
    seen = [row["path"] for row in page["items"]]
    while page["next"]:
        page = terminal.json("status", "--model", MODEL, "--limit", "2", "--after", page["next"])
        seen += [row["path"] for row in page["items"]]
    assert len(seen) == len(set(seen)) == 5
