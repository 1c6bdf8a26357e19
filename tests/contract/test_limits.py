"""One table of limits: the same answer on SQLite and PostgreSQL, whatever is too long; and pages that stay small."""

from __future__ import annotations

import httpx
import pytest
from fixtures.api import Api, Start, put_ready, sqlite_only
from fixtures.registry import record
from sqlalchemy import text

from weighbridge import limits
from weighbridge.registry import aliases, checkpoints, tags
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Invalid
from weighbridge.registry.models import Checkpoint, Event, Version
from weighbridge.registry.schemas import VariantTensor
from weighbridge.registry.variants import record_tensors


@pytest.fixture
def admin(closed_api: Api) -> httpx.Client:
    put_ready(closed_api)
    return closed_api.http(closed_api.token("admin"))


NAMES = [
    ("PUT", "/v1/models/digits/aliases/{}", {"version": 1}, limits.ALIAS, 200),
    ("PUT", "/v1/models/digits/tags/{}", {"value": "x"}, limits.TAG_KEY, 204),
    ("PUT", "/v1/models/digits/versions/1/tags/{}", {"value": "x"}, limits.TAG_KEY, 204),
    ("DELETE", "/v1/models/digits/tags/{}", None, limits.TAG_KEY, 404),
    ("GET", "/v1/models/{}", None, limits.MODEL, 404),
    ("GET", "/v1/models/digits/versions/{}", None, limits.ALIAS, 404),
    ("GET", "/v1/versions?model={}", None, limits.MODEL, 200),
    ("GET", "/v1/versions?path={}", None, limits.PATH, 200),
    ("GET", "/v1/events?kind={}", None, limits.ID, 200),
]


@pytest.mark.parametrize(("method", "path", "body", "most", "good"), NAMES)
def test_names_have_one_limit_on_both_databases(
    admin: httpx.Client, method: str, path: str, body: object, most: int, good: int
) -> None:
    """Any length up to the limit is taken, also what is longer than an event's subject; one more is 422."""
    for length in (1, 58, 59, 64, 65, most):
        if length <= most:
            answer = admin.request(method, path.format("a" * length), json=body)
            assert answer.status_code == good, (length, answer.text)
    for length in (most + 1, most * 40):
        assert admin.request(method, path.format("a" * length), json=body).status_code == 422


TEXTS = [
    ("PUT", "/v1/models/digits/tags/k", "value", limits.TAG_VALUE),
    ("POST", "/v1/rollouts", "variant", limits.ID),
    ("POST", "/v1/hosts", "name", limits.NAME),
    ("POST", "/v1/hosts", "url", limits.PATH),
    ("POST", "/v1/tokens", "name", limits.NAME),
]


@pytest.mark.parametrize(("method", "path", "field", "most"), TEXTS)
def test_texts_have_one_limit_on_both_databases(
    admin: httpx.Client, method: str, path: str, field: str, most: int
) -> None:
    """What is sent in a body too; 422 names the field, and never comes from the database."""
    rest = {"model": "digits", "name": "h", "role": "viewer"}
    assert admin.request(method, path, json={**rest, field: "é" * most}).status_code in (200, 201, 204, 404)
    answer = admin.request(method, path, json={**rest, field: "é" * (most + 1)})
    assert (answer.status_code, field in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize("odd", ["\\u0000", "\\ud800"], ids=["NUL", "half of a pair"])
def test_what_no_text_holds_is_refused(admin: httpx.Client, odd: str) -> None:
    """PostgreSQL alone refuses NUL; half of a surrogate pair can be stored as JSON and never be answered again."""
    sent = {"content-type": "application/json"}
    for method, path, body in (
        ("PUT", "/v1/models/digits/tags/k", '{"value": "%s"}'),
        ("POST", "/v1/hosts", '{"name": "h", "labels": {"a": "%s"}}'),
        ("POST", "/v1/hosts", '{"name": "h", "device": {"a": ["%s"]}}'),
        ("POST", "/v1/rollouts", '{"model": "digits", "settings": {"fleet": {"a": "%s"}}}'),
    ):
        assert admin.request(method, path, content=body % odd, headers=sent).status_code in (400, 422), path
    assert admin.get("/v1/hosts").status_code == 200


def test_reasons_are_cut_with_a_mark(database: Database) -> None:
    """A reason that quotes megabytes of a file is stored short, and seen again it is no news."""
    reason = "x" * (1 << 20) + "\0"
    for _ in range(3):
        with database.transaction() as tx:
            checkpoints.waiting(tx, "digits", "digits/a", reason=reason, seen="one")
    with database.read() as tx:
        row = tx.get_one(Checkpoint, 1)
        assert len(row.reason) <= limits.REASON
        assert row.reason.endswith("(1,048,577 characters, cut)")
        assert row.revision == 1
        told = tx.query(Event).all()
        assert [len(event.reason) <= limits.REASON for event in told] == [True]
        assert len(str(told[0].after)) < 2 * limits.REASON


def test_long_names_are_whole_where_it_counts(database: Database) -> None:
    """An event's subject is short; the name that it is about stands in the event, whole."""
    with database.transaction() as tx:
        record(tx)
        aliases.set_alias(tx, "digits", "a" * 255, 1, actor="x" * 300)
        tags.set_tag(tx, "digits", 0, "k" * 255, "v", actor="ann")
    with database.read() as tx:
        alias, tag = tx.query(Event).filter(Event.kind.in_(["alias.moved", "tag.set"])).order_by(Event.id)
        assert (len(alias.subject), alias.after["alias"]) == (limits.SUBJECT, "a" * 255)
        assert (len(tag.subject), tag.after["key"]) == (limits.SUBJECT, "k" * 255)
        assert len(alias.actor) == limits.ACTOR


def test_a_column_refuses_before_sql(database: Database) -> None:
    """Whoever forgot to check is told so in the same words on both databases, and the transaction leaves nothing."""
    with pytest.raises(Invalid, match=r"at most 1024 characters"), database.transaction() as tx:
        tx.add(Checkpoint(model="digits", path="p" * 1025, state="waiting"))
    with pytest.raises(Invalid, match="NUL"), database.transaction() as tx:
        tx.add(Checkpoint(model="a\0b", path="p", state="waiting"))
    with database.read() as tx:
        assert checkpoints.lookup(tx, "digits", "p" * 5000) is None


def test_infinities_in_facts_are_words_on_both_databases(database: Database) -> None:
    """PostgreSQL refuses `Infinity` in JSON; what a stage found is kept all the same."""
    with database.transaction() as tx:
        record(tx).version.facts = {"largest": [float("inf"), {"b": float("nan")}], "mean": 1.5}
    with database.read() as tx:
        assert tx.get_one(Version, 1).facts == {"largest": ["inf", {"b": "nan"}], "mean": 1.5}


def _grow(api: Api, rows: int, bytes_a_row: int) -> None:
    """Rows as a release without limits wrote them."""
    with api.db.transaction() as tx:
        for number in range(rows):
            record(tx, f"{number:03}")
        tx.flush()
        tx.execute(text("UPDATE version SET reason = :long"), {"long": "x" * bytes_a_row})
        tx.execute(text("UPDATE event SET reason = :long"), {"long": "x" * bytes_a_row})


def test_a_page_has_a_budget_of_bytes(start_api: Start) -> None:
    """Rows that hold megabytes each make no large answer: they are cut, and what does not fit is on the next page."""
    api = start_api(host="0.0.0.0", page_bytes=1 << 16)
    _grow(api, 60, 1 << 20)
    token = api.token("viewer")
    http, client = api.http(token), api.client(token)
    for path in ("/v1/versions?limit=1000", "/v1/events?after=0&limit=1000"):
        answer = http.get(path)
        assert len(answer.content) < (1 << 16) + 4096
        assert 0 < len(answer.json()["items"]) < 60
    assert [version.number for version in client.versions()] == list(range(60, 0, -1))
    seen, after = [], 0
    while page := client.events(after, limit=1000):
        seen += [event.seq for event in page]
        after = seen[-1]
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) >= 60


@sqlite_only
def test_one_row_is_always_on_the_page(start_api: Start) -> None:
    """Also one that is larger than a page: else nobody would get past it."""
    api = start_api(host="0.0.0.0", page_bytes=1 << 16)
    with api.db.transaction() as tx:
        for name in ("a", "b"):
            record(tx, model=name)
            for number in range(20):
                tags.set_tag(tx, name, 0, f"{number}", "x" * limits.TAG_VALUE, actor="ann")
    client = api.client(api.token("viewer"))
    assert [model.name for model in client.models()] == ["a", "b"]


@sqlite_only
def test_an_owner_has_so_many_tags_and_aliases(database: Database) -> None:
    """A model of a million tags would be one answer of gigabytes."""
    with database.transaction() as tx:
        record(tx)
        for number in range(limits.TAGS):
            tags.set_tag(tx, "digits", 1, f"{number}", "v", actor="ann")
        tags.set_tag(tx, "digits", 1, "0", "again", actor="ann")
        tags.set_tag(tx, "digits", 0, "another owner", "v", actor="ann")
    with database.transaction() as tx, pytest.raises(Invalid, match=f"{limits.TAGS} tags"):
        tags.set_tag(tx, "digits", 1, "one more", "v", actor="ann")
    with database.transaction() as tx:
        for number in range(limits.ALIASES):
            aliases.set_alias(tx, "digits", f"a{number}", 1, actor="ann")
        aliases.set_alias(tx, "digits", "a0", 1, actor="ann")
        with pytest.raises(Invalid, match=f"{limits.ALIASES} aliases"):
            aliases.set_alias(tx, "digits", "more", 1, actor="ann")


def test_tensors_come_in_pages(start_api: Start) -> None:
    """Two hundred thousand rows are no single answer; the client gives them whole, in order."""
    api = start_api(host="0.0.0.0", page_bytes=1 << 16)
    version = put_ready(api)
    rows = [VariantTensor(name=f"{number:04}{'n' * 600}", action="kept") for number in range(250)]
    with api.db.transaction() as tx:
        record_tensors(tx, 1, rows, judgement=version.judgement)
    token = api.token("viewer")
    path = "/v1/models/digits/versions/1/variants/original/tensors"
    assert len(api.http(token).get(path, params={"limit": 1000}).content) < (1 << 16) + 4096
    assert api.client(token).tensors("digits", 1, "original") == rows


@pytest.mark.parametrize("most", [10, 40, 2000])
def test_cutting_twice_changes_nothing(most: int) -> None:
    """What was cut is within the limit, whatever it is."""
    for length in (0, most - 1, most, most + 1, 100 * most):
        cut = limits.cut("x" * length, most)
        assert len(cut) <= most
        assert limits.cut(cut, most) == cut
        assert (cut == "x" * length) == (length <= most)


def test_a_name_in_a_message_is_short_and_plain() -> None:
    """Quoted, escaped, cut, with its length."""
    assert limits.quoted("a\nb") == r"'a\nb'"
    assert limits.quoted("x" * 5000) == f"'{'x' * limits.QUOTED}…' (5,000 characters)"
