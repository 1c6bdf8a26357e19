"""Aliases, tags and listings on both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fixtures.registry import record, work
from sqlalchemy import Engine, event

from weighbridge.registry import aliases, artifacts, catalog, queries, tags
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Conflict, Invalid, NotFound, RevisionMismatch
from weighbridge.registry.schemas import GateResult, Metric


@pytest.fixture
def three(database: Database) -> Database:
    """A model with three versions."""
    with database.transaction() as tx:
        for name in "abc":
            record(tx, name)
    return database


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Every statement that is executed from here on."""
    seen: list[str] = []

    def note(_c: object, _u: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


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
    """Written again they change; versions are found by them; what is not there is named."""
    with three.transaction() as tx:
        tags.set_tag(tx, "digits", 0, "team", "vision", actor="ada")
        tags.set_tag(tx, "digits", 2, "run", "17", actor="ada")
        tags.set_tag(tx, "digits", 2, "run", "18", actor="ada")
        assert [row.number for row, _ in queries.versions(tx, tags={"run": "18"})] == [2]
        assert queries.versions(tx, tags={"run": "17"}) == []
        assert queries.model_notes(tx, [1])[1] == {1: {"team": "vision"}}
        tags.delete_tag(tx, "digits", 2, "run", actor="ada")
        with pytest.raises(NotFound, match="no tag run of digits@2"):
            tags.delete_tag(tx, "digits", 2, "run", actor="ada")
        with pytest.raises(NotFound, match="no version digits@9"):
            tags.set_tag(tx, "digits", 9, "run", "1", actor="ada")
        with pytest.raises(Invalid, match="a key of 1 to 255"):
            tags.set_tag(tx, "digits", 0, " ", "1", actor="ada")


def test_pages_go_on_where_the_last_one_ended(three: Database) -> None:
    """By key, newest first, so that new rows do not shift a page."""
    with three.transaction() as tx:
        first = queries.versions(tx, model="digits", limit=2)
        record(tx, "d")
        rest = queries.versions(tx, model="digits", before=first[-1][0].id, limit=2)
        assert [row.number for row, _ in first + rest] == [3, 2, 1]
        assert queries.versions(tx, statuses=["ready"]) == []
        catalog.create(tx, "letters", description="a to z", actor="ada")
        assert [row.name for row in catalog.page(tx, after="digits")] == ["letters"]
        assert catalog.latest(tx, [1, 2]) == {1: 4}


def test_a_page_costs_the_same_whatever_its_length(three: Database, statements: list[str]) -> None:
    """Aliases, tags and measurements are fetched for all rows at once."""
    with three.transaction() as tx:
        variant = artifacts.store_artifact(tx, 1, artifact_digest="aa", blobs={})
        assert variant.id is not None
        artifacts.record_metrics(tx, variant.id, [Metric(name="f1", value=1.0, slice="class=3")], judgement=1)
        artifacts.record_gates(tx, variant.id, [GateResult(gate="f1", verdict="passed")], judgement=1)
        aliases.set_alias(tx, "digits", "best", 1, actor="ada")
        tags.set_tag(tx, "digits", 3, "run", "17", actor="ada")
    statements.clear()
    with three.read() as tx:
        rows = [row for row, _ in queries.versions(tx, model="digits")]
        notes = queries.notes(tx, rows)
    assert len([statement for statement in statements if "SELECT" in statement]) == 3
    assert {row.number: (notes[row.id or 0].aliases, notes[row.id or 0].tags) for row in rows} == {
        1: (["best"], {}),
        2: ([], {}),
        3: ([], {"run": "17"}),
    }
    with three.read() as tx:
        (measured,) = queries.variants(tx, rows[-1])
        assert ([m.slice for m in measured.metrics], [g.gate for g in measured.gates]) == (["class=3"], ["f1"])


def test_counts_for_the_status_page(three: Database) -> None:
    """Models, versions by status, jobs by state."""
    with three.transaction() as tx:
        job = queries.jobs(tx, subject=("version", 1))[0]
        work(tx, job.id)
        assert queries.counts(tx) == queries.Counts(1, {"discovered": 3}, {"queued": 3, "done": 1})
        assert [row.stage for row in queries.jobs(tx, states=["queued"], limit=1)] == ["evaluate"]
        assert queries.jobs(tx, before=1) == []


def test_a_model_is_described_by_its_revision(three: Database) -> None:
    """A demanded revision that is not the row's is refused; the change is there afterwards."""
    with three.transaction() as tx:
        catalog.describe(tx, "digits", "handwriting", actor="ada", expected_revision=1)
        assert catalog.get(tx, "digits").description == "handwriting"
        with pytest.raises(RevisionMismatch):
            catalog.describe(tx, "digits", "other", actor="ada", expected_revision=1)
        with pytest.raises(Conflict, match="model digits is there already"):
            catalog.create(tx, "digits", actor="ada")
        with pytest.raises(NotFound, match="no model letters"):
            catalog.describe(tx, "letters", "", actor="ada")
