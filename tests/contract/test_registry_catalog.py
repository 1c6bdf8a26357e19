"""Models, aliases and tags on both databases."""

from __future__ import annotations

import pytest
from fixtures.registry import record
from sqlmodel import select

from weighbridge.registry import aliases, catalog, tags
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Conflict, Invalid, NotFound, RevisionMismatch
from weighbridge.registry.models import Tag


@pytest.fixture
def three(database: Database) -> Database:
    """A model with three versions."""
    with database.transaction() as tx:
        for name in "abc":
            record(tx, name)
    return database


def test_an_alias_moves_with_its_revision(three: Database) -> None:
    """Setting what is set changes nothing; a demanded revision that is not the row's is refused."""
    with three.transaction() as tx:
        assert aliases.set_alias(tx, "digits", "best", 1, actor="ada", expected_revision=0).revision == 1
        assert aliases.set_alias(tx, "digits", "best", 1, actor="ada").revision == 1
        assert aliases.set_alias(tx, "digits", "best", 3, actor="ada", expected_revision=1).revision == 2
        with pytest.raises(RevisionMismatch, match="alias best of model digits is at revision 2, not 1"):
            aliases.set_alias(tx, "digits", "best", 2, actor="ada", expected_revision=1)
        with pytest.raises(RevisionMismatch):
            aliases.delete_alias(tx, "digits", "best", actor="ada", expected_revision=1)
        aliases.delete_alias(tx, "digits", "best", actor="ada", expected_revision=2)
        with pytest.raises(NotFound, match="no alias best of model digits"):
            aliases.delete_alias(tx, "digits", "best", actor="ada")


def test_an_alias_names_a_version_that_is_there(three: Database) -> None:
    """Versions that are not there, reserved names and numbers are refused with the rule."""
    with three.transaction() as tx:
        with pytest.raises(NotFound, match="no version digits@9"):
            aliases.set_alias(tx, "digits", "best", 9, actor="ada")
        with pytest.raises(Conflict, match="champion is moved by rollouts"):
            aliases.set_alias(tx, "digits", "champion", 1, actor="ada")
        for name in ("latest", "7", "v7", "a b", ""):
            with pytest.raises(Invalid, match="not a version number"):
                aliases.set_alias(tx, "digits", name, 1, actor="ada")


def test_tags_of_models_and_versions(three: Database) -> None:
    """Written again they change; what is not there is named."""
    with three.transaction() as tx:
        tags.set_tag(tx, "digits", 0, "team", "vision", actor="ada")
        tags.set_tag(tx, "digits", 2, "run", "17", actor="ada")
        tags.set_tag(tx, "digits", 2, "run", "18", actor="ada")
        found = {(tag.number, tag.key): tag.value for tag in tx.scalars(select(Tag))}
        assert found == {(0, "team"): "vision", (2, "run"): "18"}
        tags.delete_tag(tx, "digits", 2, "run", actor="ada")
        with pytest.raises(NotFound, match="no tag run of digits@2"):
            tags.delete_tag(tx, "digits", 2, "run", actor="ada")
        with pytest.raises(NotFound, match="no version digits@9"):
            tags.set_tag(tx, "digits", 9, "run", "1", actor="ada")
        with pytest.raises(Invalid, match="a key of 1 to 255"):
            tags.set_tag(tx, "digits", 0, " ", "1", actor="ada")


def test_pages_go_on_where_the_last_one_ended(three: Database) -> None:
    """Models by name; the newest version's number beside each that has one."""
    with three.transaction() as tx:
        catalog.ensure(tx, "letters", actor="ada")
        assert [row.name for row in catalog.page(tx, limit=1)] == ["digits"]
        assert [row.name for row in catalog.page(tx, after="digits")] == ["letters"]
        assert catalog.get(tx, "letters").next_version == 1
        assert catalog.latest(tx, [1, 2]) == {1: 3}
