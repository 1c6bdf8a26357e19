"""By which names and from which pages a server is called."""

from __future__ import annotations

import platform

import pytest

from weighbridge.inbound.callers import AmbiguousName, CallerRefused, Callers, ForeignOrigin, UnknownName

KNOWN = Callers.of(
    "10.0.0.7", "https://models.example.com/v2", ("*.fleet.internal", "Spare."), ("https://app.example.com/",)
)


def check(host: str | None, origin: str | None = None, callers: Callers = KNOWN) -> None:
    sent = [(b"host", host)] if host is not None else []
    sent += [(b"origin", origin)] if origin is not None else []
    callers.check([(b"accept", b"*/*"), *((name, value.encode("latin-1")) for name, value in sent)])


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LOCALHOST:8500", "localhost.", "x.localhost:1", platform.node(), f"{platform.node()}:8500",
        "127.0.0.1", "127.0.0.1:8500", "10.0.0.7:8500", "203.0.113.9", "0.0.0.0:8500", "[::1]:8500", "[::1]",
        "[2001:db8::1]:443", "models.example.com", "models.example.com.:443", "a.fleet.internal",
        "a.b.fleet.internal:80", "spare", "host-1:8500", "h", None,
    ],
)  # fmt: skip
def test_addresses_and_own_names_are_let_through(host: str | None) -> None:
    """A health check by address, by whichever it is; what the operator named; HTTP/1.0 without a name."""
    check(host)
    check(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8500", "localhost.evil.example", "127.0.0.1.evil.example",
        "models.example.com.evil", "fleet.internal.evil", "xfleet.internal", "0x7f.1", "a.b",
        "127.1.evil", "example.com", "1.2.3.4.5", "a." * 100,
    ],
)  # fmt: skip
def test_a_name_that_was_pointed_here_is_another_servers(host: str) -> None:
    """421, every time; what is said of it is short."""
    for _ in range(2):
        with pytest.raises(UnknownName) as told:
            check(host)
    assert told.value.status == 421
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    "host", ["", " ", "a b", "user@localhost", "localhost/x", "local\x00host", "::1", "localhost:x", "é", "a" * 5000]
)
def test_what_is_no_name_is_refused(host: str) -> None:
    """400: whoever reads it may read it otherwise. Its control characters are not repeated."""
    with pytest.raises(AmbiguousName) as told:
        check(host)
    assert str(told.value).isprintable()


def test_two_names_are_none() -> None:
    """Neither the first nor the last counts."""
    with pytest.raises(AmbiguousName):
        KNOWN.check([(b"host", b"localhost"), (b"host", b"localhost")])


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8500", "http://localhost:8500"),
        ("models.example.com", "https://models.example.com"),
        ("models.example.com:443", "https://models.example.com"),
        ("[::1]:8500", "http://[::1]:8500"),
        ("localhost", "https://app.example.com"),
        ("localhost", "HTTPS://APP.example.com"),
    ],
)
def test_its_own_pages_and_those_that_were_named(host: str, origin: str) -> None:
    """A page that came from where its request goes, and what the settings allow."""
    check(host, origin)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8500", "http://evil.example"),
        ("localhost:8500", "null"),
        ("localhost:8500", ""),
        ("localhost:8500", "http://localhost"),
        ("localhost:8500", "http://localhost:3000"),
        ("localhost:8500", "http://127.0.0.1:8500"),
        ("localhost:8500", "localhost:8500"),
        ("localhost:8500", "file://localhost:8500"),
        ("localhost", "https://app.example.com.evil"),
        ("localhost", "http://app.example.com"),
        (None, "http://localhost"),
        (None, "null"),
        (None, "http://"),
    ],
)
def test_other_pages_may_not_call(host: str | None, origin: str) -> None:
    """403: a page of another port, scheme or name is another page."""
    with pytest.raises(ForeignOrigin) as told:
        check(host, origin)
    assert told.value.status == 403


def test_one_foreign_origin_among_several_is_enough() -> None:
    """Whoever reads the last of them must not be fooled by the first."""
    with pytest.raises(ForeignOrigin):
        KNOWN.check([(b"host", b"localhost"), (b"origin", b"http://localhost"), (b"origin", b"http://evil.example")])


def test_an_operator_may_let_any_name_through() -> None:
    """Behind a proxy that checks names itself; pages elsewhere still may not."""
    anybody = Callers(("*",))
    check("evil.example", None, anybody)
    with pytest.raises(CallerRefused):
        check("evil.example", "http://other.example", anybody)


def test_what_is_remembered_is_bounded() -> None:
    """A caller with ever new addresses fills no memory."""
    callers = Callers(())
    for number in range(2000):
        check(f"10.0.{number // 256}.{number % 256}", None, callers)
    assert len(callers._remembered) <= 256
