"""What is not there is named, with what may have been meant; the command line ends with one code for it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from fixtures.api import Api, put_ready, sqlite_only

from weighbridge.cli import main, session
from weighbridge.cli.exits import Exit
from weighbridge.registry import checkpoints
from weighbridge.registry.errors import NotFound
from weighbridge.registry.schemas import Enrolment
from weighbridge.registry.spelling import nearest


@pytest.fixture
def there(api: Api, monkeypatch: pytest.MonkeyPatch) -> Api:
    """A model with a version, an alias, a host and a waiting checkpoint of another model; the terminal is its."""
    put_ready(api)
    client = api.client()
    client.set_alias("digits", "staging", 1)
    client.enrol(Enrolment(name="gpu-7"))
    with api.db.transaction() as tx:
        checkpoints.waiting(tx, "letters", "letters/a.safetensors", reason="short", seen="s")
    monkeypatch.setattr(session.Session, "client", lambda _: nullcontext(client))
    return api


@sqlite_only
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("versions digts", "no model digts: did you mean digits?"),
        ("versions nope", "no model nope"),
        ("show digts", "no model digts: did you mean digits?"),
        ("show digits 9", "no version digits@9: did you mean digits@1?"),
        ("show digits stagin", "no version digits@stagin: did you mean digits@staging?"),
        ("show digits lates", "no version digits@lates: did you mean digits@latest?"),
        ("rejudge digts 1", "no model digts: did you mean digits?"),
        ("archive digits 9", "no version digits@9: did you mean digits@1?"),
        ("unarchive digts 1", "no model digts: did you mean digits?"),
        ("variants digits 1 --tensors origina", "no variant origina of version 1: did you mean original?"),
        ("download digits 1 --variant origina", "no variant origina of version 1 of digits: did you mean original?"),
        ("benchmark retry digits 1 origina", "no variant origina of version 1: did you mean original?"),
        ("alias list digts", "no model digts: did you mean digits?"),
        ("alias delete digits stagng", "no alias stagng of model digits: did you mean staging?"),
        ("alias set digts staging 1", "no model digts: did you mean digits?"),
        ("rollouts list digts", "no model digts: did you mean digits?"),
        ("rollouts start digts", "no model digts: did you mean digits?"),
        ("rollouts start digits stagin", "no version digits@stagin: did you mean digits@staging?"),
        ("rollback digits 9", "no version digits@9: did you mean digits@1?"),
        ("rollouts show 77", "no rollout 77"),
        ("rollouts pause 77", "no rollout 77"),
        ("retire gpu7", "no host gpu7: did you mean gpu-7?"),
        ("retire no/such host", "no host no/such"),
        ("token revoke 77", "no token 77"),
        ("events --model digts", "no model digts: did you mean digits?"),
        ("report digts", "no model digts: did you mean digits?"),
    ],
)
def test_a_name_that_is_not_there(
    there: Api, command: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    """Whatever it names: exit code 3, the name, and the one that is spelled most like it."""
    code = main(command.split(" ", 1) if command.startswith("retire") else command.split())
    err = capsys.readouterr().err
    assert (code, words in err) == (Exit.NOT_FOUND, True), err


@sqlite_only
def test_what_only_waits_is_known(there: Api, capsys: pytest.CaptureFixture[str]) -> None:
    """A model without a version yet is none that is misspelt; nothing of it is an empty answer."""
    for command in ("versions letters", "rollouts list letters", "events --model letters --kind x"):
        assert main(command.split()) == Exit.OK, capsys.readouterr().err


@sqlite_only
def test_the_client_says_it_too(there: Api) -> None:
    """As an error with the data. A filter selects: of a model that may come yet there is nothing so far."""
    with pytest.raises(NotFound) as found:
        there.client().model("digts")
    assert (found.value.what, found.value.name, found.value.near) == ("model", "digts", "digits")
    assert list(there.client().versions("digts")) == list(there.client().rollouts("digts")) == []
    with pytest.raises(NotFound, match="no template smal"):
        there.client().template("smal")
    with pytest.raises(NotFound, match="no host gpu8: did you mean gpu-7"):
        there.client().host("gpu8")


@sqlite_only
def test_a_rollout_starts_by_an_alias(there: Api) -> None:
    """As by a number."""
    assert there.client().start_rollout("digits", "staging").number == 1


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("Digits", ["digits"], "digits"),
        ("x", ["digits"], ""),
        ("champoin", ["a", "champion"], "champion"),
        ("", [], ""),
    ],
)
def test_nearest(name: str, known: list[str], near: str) -> None:
    """Like in letters, whatever their case; nothing where nothing is."""
    assert nearest(name, known) == near
