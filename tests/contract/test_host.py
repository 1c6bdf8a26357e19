"""What every host does, the one in memory and the agent alike: hold what is wanted, prove it, say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures.api import Api, assign, sqlite_only
from fixtures.hosting import (
    HostUnderTest,
    InMemory,
    InThread,
    artifact_of,
    become,
    give,
    live,
    put_version,
    seen,
    store_of,
    until,
)

from weighbridge.engines.hardware import describe
from weighbridge.hosts.errors import NotReady
from weighbridge.registry import hosts

pytestmark = sqlite_only

KINDS: dict[str, Callable[[Api, Path], HostUnderTest]] = {"memory": InMemory, "agent": InThread}


@pytest.fixture(params=KINDS)
def host(request: pytest.FixtureRequest, api: Api, tmp_path: Path) -> Iterator[HostUnderTest]:
    made = KINDS[request.param](api, tmp_path / "host")
    yield made
    made.stop()


def test_it_holds_what_is_wanted_and_swaps(api: Api, host: HostUnderTest) -> None:
    """Live with the golden proven; then the next one; then nothing."""
    first, second = put_version(api, 1), put_version(api, 2)
    assert live(api, host, first).golden == "passed"
    assert host.infer(3) == (first.number, 3)
    assert live(api, host, second).golden == "passed"
    assert host.infer(3) == (second.number, 6)
    with api.db.transaction() as tx:
        hosts.assign(tx, host.id, second.model_id, [], None)
    api.notifier.ring("hosts")

    def gone() -> bool:
        try:
            host.infer(3)
        except LookupError:
            return True
        return False

    until(host, gone)


def test_it_says_what_kind_of_device_it_serves_on(api: Api, host: HostUnderTest) -> None:
    """By its fingerprint, which variants are chosen by; the one in memory claims none."""
    until(host, lambda: host.id)
    device = api.client().host(host.id).device
    if isinstance(host, InMemory):
        assert device == {"kind": ""}
    else:
        assert device == {**describe("cpu").model_dump(mode="json"), "setting": "cpu"}


@pytest.mark.parametrize(
    ("program", "golden", "words"), [("broken", "unchecked", "tensor 'w'"), ("liar", "failed", "differs by")]
)
def test_what_does_not_come_up_leaves_the_old_one_serving(
    api: Api, host: HostUnderTest, program: str, golden: str, words: str
) -> None:
    """The registry learns the reason, and whether it was the golden; going back is live at once."""
    good, bad = put_version(api, 1), put_version(api, 2, program)
    live(api, host, good)
    give(api, host, bad)
    told = become(api, host, bad, "failed")
    assert words in told.reason
    assert told.golden == golden
    assert host.infer(3) == (good.number, 3)
    assert live(api, host, good).reason == ""


def test_a_blob_that_is_not_what_its_digest_says_is_never_loaded(api: Api, host: HostUnderTest) -> None:
    """Neither a manifest nor weights; when the store is repaired it goes on by itself."""
    version = put_version(api, 1)
    artifact = artifact_of(api, version)
    whole = api.blobs.get(artifact)
    store_of(api).put(api.blobs.key(artifact), whole.replace(b"times-1", b"times-7"))
    give(api, host, version)
    assert "has the digest" in become(api, host, version, "failed").reason
    with pytest.raises((LookupError, NotReady)):
        host.infer(3)
    store_of(api).put(api.blobs.key(artifact), whole)
    become(api, host, version, "live")


def test_it_converges_after_having_been_away(api: Api, host: HostUnderTest) -> None:
    """Cut off it goes on serving; back again it holds what is wanted by then, and skips what was in between."""
    versions = [put_version(api, factor) for factor in (1, 2, 3)]
    live(api, host, versions[0])
    host.wire.cut = True
    for version in versions[1:]:
        assign(api, host.id, version)
    host.turn()
    assert host.infer(3) == (versions[0].number, 3)
    host.wire.cut = False
    become(api, host, versions[2], "live")
    assert host.infer(3) == (versions[2].number, 9)
    assert artifact_of(api, versions[1]) not in host.wire.fetched


def test_a_lost_report_is_repeated_and_counted_once(api: Api, host: HostUnderTest) -> None:
    """Its answer was lost, not the report: the registry counts the interval once, and none is missing."""
    live(api, host, put_version(api, 1))
    for _ in range(5):
        host.infer(1)
    host.wire.lose = 6
    before = host.wire.reports
    until(host, lambda: host.wire.lose == 0)
    for _ in range(2):
        host.infer(1)
    until(host, lambda: counted(api, host) >= 7)
    seen_now = host.wire.reports
    until(host, lambda: host.wire.reports > seen_now)
    assert counted(api, host) == 7
    assert host.wire.reports > before + 6


def counted(api: Api, host: HostUnderTest) -> int:
    view = seen(api, host)
    return view.requests if view else 0
