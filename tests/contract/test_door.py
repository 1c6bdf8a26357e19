"""Who stands at the registry's door, on loopback as anywhere: no token, another name, a page, a proxy, a browser."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fixtures.api import Api, Start, sqlite_only
from pydantic import SecretStr

from weighbridge.registry import admission, local, tokens
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Forbidden, Invalid
from weighbridge.registry.settings import RegistrySettings
from weighbridge.storage.private import NotPrivate

pytestmark = sqlite_only

MINE, THEIRS = "m" * 40, "t" * 40


@pytest.fixture
def stranger(api: Api) -> httpx.Client:
    """Whoever calls a registry on loopback without a token."""
    api.lent = None
    return api.http()


def test_loopback_is_not_admin(api: Api, stranger: httpx.Client) -> None:
    """Without a token a local user puts no blob, registers no template, mints no token, reads nothing."""
    assert stranger.put(f"/v1/blobs/{'0' * 64}", content=b"evil").status_code == 401
    assert stranger.post("/v1/templates", json={}).status_code == 401
    assert stranger.post("/v1/tokens", json={"role": "admin"}).status_code == 401
    assert stranger.post("/v1/hosts", json={"name": "h"}).status_code == 401
    assert stranger.post("/v1/sessions").status_code == 401
    assert stranger.get("/v1/models").status_code == stranger.get("/").status_code == 401
    assert stranger.get("/healthz").status_code == stranger.get("/readyz").status_code == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "Via", "X-Real-IP"])
def test_what_a_proxy_forwards_is_refused(api: Api, start_api: Start, header: str) -> None:
    """With a good token too, from loopback too; unless the settings trust the proxy. Health is told to anybody."""
    assert api.http(**{header: "10.0.0.9"}).get("/v1/models").status_code == 403
    assert api.http(**{header: "10.0.0.9"}).get("/healthz").status_code == 200
    other = start_api(trusted_proxies=("10.1.0.0/16",))
    assert other.http(**{header: "10.0.0.9"}).get("/v1/models").status_code == 403
    behind = start_api(trusted_proxies=("10.1.0.0/16", "127.0.0.1"))
    assert behind.http(**{header: "10.0.0.9"}).get("/v1/models").status_code == 200


def test_a_trusted_proxy_is_an_address(start_api: Start) -> None:
    """A name would be whoever the name server says."""
    with pytest.raises(Invalid, match=r"trusted_proxies: 'proxy.local'"):
        start_api(trusted_proxies=("proxy.local",))


def test_other_names_and_pages_cannot_call(api: Api) -> None:
    """A page can point a name of its own at this machine, or call across origins: refused with a token too."""
    for name in ("evil.example:8400", "127.0.0.1@evil.example", "127.0.0.1.evil.example"):
        assert api.http(host=name).get("/v1/models").status_code in (400, 421)
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "http://127.0.0.1:81"):
        assert api.http(origin=origin).delete("/v1/tokens/1").status_code == 403
    assert api.http(origin="http://127.0.0.1").get("/v1/models").status_code == 200
    for name in ("localhost:8400", "[::1]:8400", "127.0.0.1:1"):
        assert api.http(host=name).get("/v1/models").status_code == 200


def test_a_name_of_its_own_is_known(start_api: Start) -> None:
    """That of its URL, and those in the settings."""
    api = start_api(url="https://registry.example/", server_names=["wb.example"])
    assert api.http(host="registry.example").get("/v1/models").status_code == 200
    assert api.http(host="wb.example:8400").get("/v1/models").status_code == 200


def test_a_token_that_is_sent_counts(api: Api) -> None:
    """Whoever sends a token is who it says, and a wrong one is not ignored."""
    assert api.http(api.token("viewer")).get("/v1/tokens").status_code == 403
    assert api.http("wb_wrong").get("/v1/models").status_code == 401


# --- a browser


def browser(api: Api, address: str) -> tuple[httpx.Client, httpx.Response]:
    """A browser without a token that opened an address, and the answer."""
    api.lent = None
    opened = api.http()
    return opened, opened.get(address)


def test_a_browser_signs_in_once(api: Api) -> None:
    """The address becomes a cookie that scripts cannot read and other sites do not send; used twice it is 401."""
    address = api.client(api.token("publisher")).browser_address()
    opened, answer = browser(api, address)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert answer.headers["referrer-policy"] == "no-referrer"
    cookie = answer.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/", "max-age="))
    page = opened.get("/")
    assert page.status_code == 200
    assert "You are the publisher, as viewer" in page.text
    assert "script" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert api.http().get(address).status_code == 401
    assert api.http().get("/").status_code == 401


def test_a_session_reads_and_nothing_more(api: Api) -> None:
    """Whoever's it is: no other method, and nothing that a viewer may not see. As a header it is worth nothing."""
    opened, _ = browser(api, api.client(api.token("admin")).browser_address())
    assert opened.get("/v1/models").status_code == 200
    assert opened.get("/v1/tokens").status_code == 403
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert opened.request(method, "/v1/tokens").status_code == 401
    assert opened.post("/v1/sessions").status_code == 401
    (session,) = opened.cookies.values()
    assert api.http(session).get("/v1/models").status_code == 403


def test_only_a_session_is_a_session(api: Api) -> None:
    """An administrator's token as a cookie or in the address signs nobody in: both would end in histories and logs."""
    admin = api.token("admin")
    opened, _ = browser(api, api.client(admin).browser_address())
    (name,) = opened.cookies
    assert api.http(cookie=f"{name}={admin}").get("/v1/models").status_code == 401
    assert api.http().get("/", params={"token": admin}).status_code == 401
    assert api.http(admin).get("/v1/models").status_code == 200
    assert api.http(cookie=f"{name}=; {name}=x; =;;").get("/v1/models").status_code == 401


def test_what_a_page_says_of_its_reader_is_text(api: Api) -> None:
    """A name that looks like markup is shown as it is."""
    admin = api.client(api.token("admin"))
    evil = api.client(admin.create_token("viewer", "<script>alert(1)</script>"))
    opened, _ = browser(api, evil.browser_address())
    assert "<script>" not in opened.get("/").text


def test_a_session_ends(api: Api) -> None:
    """By its time, and at once when it is revoked; only hashes of it are stored."""
    admin = api.client(api.token("admin"))
    opened, _ = browser(api, admin.browser_address())
    (session,) = opened.cookies.values()
    row = next(row for row in admin.tokens() if row.role == "session")
    assert row.expires_at is not None
    assert session not in api.http(api.token("admin")).get("/v1/tokens").text
    admin.revoke_token(row.id)
    assert opened.get("/").status_code == 401


# --- whose token it is


def admit(db: Database, data: Path | None = None, token: str | None = None) -> str | None:
    """A registry's start; the token that it left."""
    settings = RegistrySettings(token=SecretStr(token) if token else None)
    admission.admit(db, settings, data)
    return local.read_token(data) if data else None


def role(db: Database, bearer: str) -> str | None:
    """What a token may do; None: nothing."""
    with db.read() as tx:
        row = tokens.find(tx, bearer)
        return row.role if row is not None and tokens.is_valid(row) else None


def test_a_start_leaves_a_token_that_only_this_user_reads(database: Database, tmp_path: Path) -> None:
    """256 bits in a 0600 file whatever the umask, only its hash in the database, and the same at the next start."""
    bearer = admit(database, tmp_path)
    assert bearer is not None
    assert len(bearer) >= 43
    assert local.token_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert role(database, bearer) == "admin"
    assert admit(database, tmp_path) == bearer
    local.token_file(tmp_path).unlink()
    assert role(database, admit(database, tmp_path) or "") == "admin"


def test_a_token_file_that_others_could_reach_is_refused(database: Database, tmp_path: Path) -> None:
    """Readable by others, a link, a pipe: the start fails and says what to do; nothing is written through it."""
    file, elsewhere = local.token_file(tmp_path), tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    elsewhere.chmod(0o600)
    file.symlink_to(elsewhere)
    with pytest.raises(NotPrivate, match="is a link"):
        admit(database, tmp_path)
    assert elsewhere.read_text() == "kept"
    file.unlink()
    file.write_text("wb_" + "x" * 43)
    for mode in (0o644, 0o640, 0o602):
        file.chmod(mode)
        with pytest.raises(NotPrivate, match="remove it"):
            admit(database, tmp_path)


def test_an_operators_token_is_always_adopted(database: Database, tmp_path: Path) -> None:
    """Also when there are admins already; what it replaces ends, and comes back when the operator says so."""
    made = admit(database, tmp_path)
    assert made is not None
    assert admit(database, tmp_path, MINE) == MINE
    assert (role(database, MINE), role(database, made)) == ("admin", None)
    assert admit(database, tmp_path, THEIRS) == THEIRS
    assert (role(database, THEIRS), role(database, MINE)) == ("admin", None)
    assert admit(database, tmp_path, MINE) == MINE
    assert (role(database, MINE), role(database, THEIRS)) == ("admin", None)
    after = admit(database, tmp_path)
    assert after not in (MINE, THEIRS, made)
    assert (role(database, after or ""), role(database, MINE)) == ("admin", None)


def test_a_revoked_token_of_an_operator_stays_revoked(database: Database, tmp_path: Path) -> None:
    """A restart does not undo what a person decided; the user of the data folder still gets in."""
    admit(database, tmp_path, MINE)
    with database.transaction() as tx:
        row = tokens.find(tx, MINE)
        assert row is not None
        tokens.revoke(tx, row.id or 0, actor="ann")
    left = admit(database, tmp_path, MINE)
    assert left != MINE
    assert (role(database, MINE), role(database, left or "")) == (None, "admin")


def test_an_operators_token_cannot_be_guessed_or_another_ones(database: Database) -> None:
    """Short ones, and those that already are somebody's with less rights."""
    with pytest.raises(Invalid, match="at least 32"):
        admit(database, token="short")
    with database.transaction() as tx:
        viewer = tokens.create(tx, "viewer", "v")
    with pytest.raises(Invalid, match="which is a viewer's"):
        admit(database, token=viewer)
    with database.transaction() as tx, pytest.raises(Invalid, match="choose another"):
        tokens.create(tx, "viewer", tokens.OPERATORS)


def test_a_registry_that_nobody_could_call_does_not_start(database: Database) -> None:
    """Without a data folder, an operator's token and any admin."""
    with pytest.raises(Forbidden, match="nobody could call"):
        admit(database)


def test_hosts_that_start_with_it_are_let_in_once(start_api: Start, database: Database) -> None:
    """By the digest of a token that the registry never saw; another start of the registry lets it in no second time."""
    once = tokens.new_bearer()
    settings = RegistrySettings(enrolments={"host-1": tokens.hash_of(once)}, token=SecretStr(MINE))
    admission.admit(database, settings, None)
    admission.admit(database, settings, None)
    api = start_api(host="0.0.0.0")
    assert api.http(once).post("/v1/hosts", json={"name": "h"}).status_code == 201
    assert api.http(once).post("/v1/hosts", json={"name": "h"}).status_code == 401
    admission.admit(database, settings, None)
    assert api.http(once).post("/v1/hosts", json={"name": "h"}).status_code == 401
