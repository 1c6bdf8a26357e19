"""A model has one name, however its letters are composed: a Mac writes `è` as an `e` and an accent."""

from __future__ import annotations

import unicodedata
from contextlib import nullcontext

import pytest
from fixtures.api import Api, put_ready, sqlite_only

from weighbridge.cli import main, session
from weighbridge.cli.exits import Exit
from weighbridge.registry import checkpoints
from weighbridge.registry.recipe import Policy, policy_for
from weighbridge.registry.schemas import Observed, ObservedModel, RolloutStart

NFC, NFD = (unicodedata.normalize(form, "modèle") for form in ("NFC", "NFD"))


@pytest.fixture
def there(api: Api) -> Api:
    """A version, and a checkpoint that waits, of a model whose name can be written in two ways."""
    put_ready(api, model=NFC)
    with api.db.transaction() as tx:
        checkpoints.waiting(tx, NFC, f"{NFC}/b.safetensors", reason="short", seen="s")
    return api


@sqlite_only
def test_a_filter_finds_the_model_in_either_spelling(there: Api) -> None:
    """Versions, what waits, events, rollouts: the same answers, and none of them is empty."""
    client = there.client()
    client.start_rollout(NFD, 1)
    for asked in (NFC, NFD):
        assert [version.model for version in client.versions(asked)] == [NFC]
        assert [one.model for one in client.checkpoint_page(asked).items] == [NFC]
        assert {one.model for one in client.events(0, model=asked)} == {NFC}
        assert [one.model for one in client.rollouts(asked)] == [NFC]
        assert client.wait(asked, version=1, timeout=0).model == NFC


@sqlite_only
def test_a_path_names_it_in_either_spelling(there: Api) -> None:
    """Reading and writing: a tag and an alias that were set under one spelling are there under the other."""
    client = there.client()
    client.set_alias(NFD, "staging", 1)
    client.set_tag(NFD, "team", "vision")
    client.set_tag(NFC, "seen", "yes", version="staging")
    assert client.version(NFC, "staging").number == client.version(NFD, "staging").number == 1
    assert client.model(NFC) == client.model(NFD)
    assert client.model(NFC).tags == {"team": "vision"}
    client.delete_alias(NFD, "staging")
    assert list(client.aliases(NFC)) == list(client.aliases(NFD)) == []


def test_a_body_names_it_in_either_spelling() -> None:
    """What is sent is one name before anybody compares it."""
    assert RolloutStart(model=NFD).model == NFC
    assert Observed(epoch=1, models=[ObservedModel(model=NFD, generation=1, slots=[])]).models[0].model == NFC


def test_a_policy_is_no_weaker_for_its_spelling() -> None:
    """The operator's pattern matches the model that it shows."""
    assert policy_for(NFC, (Policy(model=f"{NFD}*", approval=True),)).approval


@sqlite_only
def test_commands_take_either_spelling(
    there: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal of a Mac asks a registry on Linux."""
    client = there.client()
    monkeypatch.setattr(session.Session, "client", lambda _: nullcontext(client))
    for command in ("versions", "show", "events --model"):
        assert main([*command.split(), NFD]) == Exit.OK, capsys.readouterr().err
        assert "modèle" in unicodedata.normalize("NFC", capsys.readouterr().out)
