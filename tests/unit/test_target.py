"""Which registry a command means, and which store it pushes to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from weighbridge.cli import main, transfer
from weighbridge.cli.exits import Exit
from weighbridge.cli.session import Session
from weighbridge.cli.target import choose
from weighbridge.registry import local
from weighbridge.registry.errors import NotFound, Unavailable
from weighbridge.registry.local import Local
from weighbridge.registry.schemas import StoreAddress
from weighbridge.settings import load_with_origins
from weighbridge.storage import private

HERE, ELSEWHERE = "http://127.0.0.1:9411", "http://registry.example:8400"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Local:
    """A folder with a data folder whose registry got another port, and this process in a folder below."""
    for name in os.environ:
        if name.startswith("WEIGHBRIDGE_"):
            monkeypatch.delenv(name)
    data = private.make_folder(tmp_path / local.DATA)
    private.write(local.token_file(data), b"wb_x")
    found = Local(data, (HERE,), data / "s")
    local.announce(found)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    return found


def target(**flags: object) -> tuple[str, Path | None, str]:
    """What a command with these flags means: URL, data folder, what is said."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    found = choose(load_with_origins(named), Path.cwd())
    return found.url, found.data, found.note


def test_the_data_folder_at_hand_comes_before_what_is_written_down(site: Local, tmp_path: Path) -> None:
    """Also before the port and URL in a settings file: those are wrong as soon as the port was taken."""
    assert target() == (HERE, site.data, f"talking to {HERE}, the registry of {site.data}")
    Path("weighbridge.toml").write_text(f'[registry]\nport = 8400\nurl = "{ELSEWHERE}"\n')
    assert target()[:2] == (HERE, site.data)
    assert target(data=str(site.data))[:2] == (HERE, site.data)
    site.data.rename(tmp_path / "away")
    assert target() == (ELSEWHERE, None, "")


def test_what_is_said_for_a_command_or_a_shell_comes_first(site: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where another registry is at hand that is told."""
    told = f"talking to {ELSEWHERE}, not to the registry of {site.data} ({HERE})"
    assert target(registry__url=ELSEWHERE) == (ELSEWHERE, None, told)
    assert target(registry__url=HERE) == (HERE, None, "")
    monkeypatch.setenv("WEIGHBRIDGE_URL", ELSEWHERE)
    assert target() == (ELSEWHERE, None, told)


def test_a_data_folder_without_a_registry(site: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by a flag it is an error, not another site; a setting of it only says where a worker keeps its files."""
    with pytest.raises(NotFound, match="registry in the data folder"):
        target(data=str(tmp_path / "nothing"))
    monkeypatch.setenv("WEIGHBRIDGE_DATA", str(tmp_path / "nothing"))
    assert target() == ("http://127.0.0.1:8400", None, "")


def test_a_command_says_whom_it_talks_to(site: Local, capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, not with --json; a registry that ended is named with its folder, and no other one is asked."""
    assert main(["status"]) == Exit.UNAVAILABLE
    said = capsys.readouterr().err
    assert f"talking to {HERE}, the registry of {site.data}" in said
    assert f"the one of {site.data} does not run" in said
    assert main(["status", "--json"]) == Exit.UNAVAILABLE
    assert "talking to" not in capsys.readouterr().err


class Registry:
    """Tells where the store is, or is away."""

    def __init__(self, store: StoreAddress | None) -> None:
        self._store = store

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None: ...

    def store(self) -> StoreAddress:
        if self._store is None:
            raise Unavailable("no answer")
        return self._store


def pushing(store: StoreAddress | None, **flags: object) -> Any:
    """The storage settings of a push."""
    run = Session(flags={name.replace("__", "."): value for name, value in flags.items()})
    run.client = lambda: Registry(store)  # type: ignore[method-assign,assignment,return-value]
    transfer._find_store(run)
    return run.settings.storage


def test_push_asks_the_registry_where_the_store_is(site: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its prefix and endpoint; the keys, and whatever the user's settings say, are the user's own."""
    there = StoreAddress(url="s3://b", prefix="runs", endpoint_url="http://10.0.0.1:9000", region="eu")
    monkeypatch.setenv("WEIGHBRIDGE_STORAGE__S3__ACCESS_KEY", "mine")
    found = pushing(there)
    assert (found.url, found.prefix, found.s3.endpoint_url, found.s3.region) == (
        *("s3://b", "runs"),
        *("http://10.0.0.1:9000", "eu"),
    )
    assert found.s3.access_key.get_secret_value() == "mine"
    assert pushing(there, storage__s3__endpoint_url="http://tunnel:1").s3.endpoint_url == "http://tunnel:1"
    assert pushing(None, storage__url="s3://own").url == "s3://own"


def test_push_without_anybody_to_ask(site: Local) -> None:
    """Into the folder that is meant where nothing is said, if it is there; else it says that nobody answers."""
    with pytest.raises(Unavailable):
        pushing(None)
    Path("drops").mkdir()
    assert pushing(None).url == "drops"


def test_publish_finds_the_store_as_every_command_does(site: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint, region and keys: from the settings file, and from the environment before it."""
    from weighbridge import publishing
    from weighbridge.storage import urls

    opened: list[Any] = []
    monkeypatch.setattr(urls, "open_store", lambda url, options: opened.append((url, options)))
    Path("weighbridge.toml").write_text('[storage.s3]\nendpoint_url = "http://file:9000"\nregion = "eu"\n')
    publishing.open_store("s3://b/p")
    monkeypatch.setenv("WEIGHBRIDGE_STORAGE__S3__ENDPOINT_URL", "http://env:9000")
    publishing.open_store("s3://b/p")
    assert [(url, s3.endpoint_url, s3.region) for url, s3 in opened] == [
        ("s3://b/p", "http://file:9000", "eu"),
        ("s3://b/p", "http://env:9000", "eu"),
    ]


def test_doctor_checks_the_up_beside_it(site: Local) -> None:
    """Its settings, not the defaults; those that are named stay."""
    private.write(site.data / "weighbridge.toml", b'[storage]\nurl = "/the/drops"\n[broker]\nurl = "redis://its"\n')
    assert str(Session().beside_up().settings.storage.url) == "/the/drops"
    assert Session(flags={"storage.url": "/mine"}).beside_up().settings.storage.url == "/mine"
    Path("own.toml").write_text("")
    named = Session(config=Path("own.toml"))
    assert named.beside_up() is named
