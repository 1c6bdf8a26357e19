"""What makes weights the same, and who reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.checkpoints import safetensors

from weighbridge.daemon.layout import Group
from weighbridge.daemon.loops import Idle
from weighbridge.daemon.reading import Reading
from weighbridge.storage import identity
from weighbridge.storage.errors import PreconditionFailed, StorageUnavailable
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import disk_stamp, pin
from weighbridge.storage.protocols import Ref

ONE, TWO = safetensors(), safetensors({"w": ("F32", [2], bytes(8))})
GROUP = Group("m", "m/run/")


def put(store: MemoryStore, *files: tuple[str, bytes]) -> tuple[Ref, ...]:
    return tuple(pin(store.put(key, data)) for key, data in files)


def test_names_folders_and_companions_do_not_count() -> None:
    """Only what the weight files hold: one file or many, whatever they are called; but not how they are cut."""
    store = MemoryStore()
    first = put(store, ("m/a/1.safetensors", ONE), ("m/a/2.safetensors", TWO), ("m/a/config.json", b"{}"))
    other = put(store, ("m/b/x.safetensors", TWO), ("m/b/y.safetensors", ONE), ("m/b/optimizer.pt", b"x"))
    half = put(store, ("m/c.safetensors", ONE))
    assert len(identity.weights(first)) == len(identity.weights(other)) == 2
    assert identity.read(store, identity.weights(first)) == identity.read(store, identity.weights(other))
    assert identity.read(store, half) != identity.read(store, identity.weights(first))


def test_which_files_are_the_weights() -> None:
    """Safetensors; another format's only where there are none. Goldens and sets accompany."""
    keys = ["m/r/model.safetensors", "m/r/pytorch_model.bin", "m/r/golden.safetensors", "m/r/optimizer.pt"]
    refs = [Ref(key, 1, "e") for key in keys]
    assert [ref.key for ref in identity.weights(refs)] == keys[:1]
    assert [ref.key for ref in identity.weights(refs[1:])] == keys[1:2]


def test_on_disk_only_a_write_changes_the_weights(tmp_path: Path) -> None:
    """A chmod, a link and a rename away and back are told from the inode; a touch and a new file are not."""
    store = FolderStore(tmp_path, create=True)
    store.put("a.safetensors", ONE)
    file, before = tmp_path / "a.safetensors", pin(store.head("a.safetensors"))
    assert disk_stamp(before.etag) is not None
    file.chmod(0o640)
    (tmp_path / "b").hardlink_to(file)
    file.rename(tmp_path / "c")
    (tmp_path / "c").rename(file)
    after = pin(store.head("a.safetensors"))
    assert after.etag != before.etag
    assert identity.untouched(before, after)
    store.put("a.safetensors", ONE)
    assert not identity.untouched(before, pin(store.head("a.safetensors")))


@pytest.mark.parametrize("change", [{"size": 9}, {"etag": "other"}, {"key": "m/b"}, {"etag": "1-2-3-4"}])
def test_elsewhere_the_etag_tells(change: dict[str, object]) -> None:
    """An S3 object with the same ETag and size is the same, whenever it was put."""
    before = Ref("m/a", 8, "abc", None, "2026-01-01T00:00:00+00:00")
    assert identity.untouched(before, replace(before, modified="2026-02-02T00:00:00+00:00"))
    assert not identity.untouched(before, replace(before, **change))  # type: ignore[arg-type]


def test_what_is_asked_for_is_read_once_and_told() -> None:
    """The digest is there at the next look; it is forgotten when it was recorded, and other pins are read anew."""
    store, done = MemoryStore(), list[Group]()
    reading = Reading(store, done.append)
    weights = put(store, ("m/run/model.safetensors", ONE))
    assert reading.digest(GROUP, weights) is None
    assert reading.digest(GROUP, weights) is None
    assert reading.once(Idle()) == 0
    assert reading.once(Idle()) > 0
    assert done == [GROUP]
    assert reading.digest(GROUP, weights) == identity.read(store, weights)
    again = put(store, ("m/run/model.safetensors", TWO))
    assert reading.digest(GROUP, again) is None
    reading.forget(GROUP)
    assert reading.once(Idle()) > 0


def test_what_changes_while_it_is_read_is_looked_at_again() -> None:
    """Its pins are no more: the look finds the new ones."""
    store, done = MemoryStore(), list[Group]()
    reading = Reading(store, done.append)
    weights = put(store, ("m/run/model.safetensors", ONE))
    assert reading.digest(GROUP, weights) is None
    put(store, ("m/run/model.safetensors", TWO))
    reading.once(Idle())
    assert done == [GROUP]
    assert reading.digest(GROUP, weights) is None


def test_a_store_that_is_away_loses_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop backs off, and reads it when the store is back."""
    store = MemoryStore()
    weights = put(store, ("m/run/model.safetensors", ONE))
    reading = Reading(store)
    reading.digest(GROUP, weights)
    with monkeypatch.context() as patched:
        for call in ("open", "check"):
            patched.setattr(store, call, _raise)
        with pytest.raises(StorageUnavailable):
            reading.once(Idle())
    reading.once(Idle())
    assert reading.digest(GROUP, weights) is not None


def test_a_daemon_that_ends_stops_reading() -> None:
    """In the middle of a file, without a digest."""

    class Ending(Idle):
        stopping = True

    store = MemoryStore()
    weights = put(store, ("m/run/model.safetensors", ONE))
    reading = Reading(store)
    reading.digest(GROUP, weights)
    reading.once(Ending())
    assert reading.digest(GROUP, weights) is None


def test_a_file_that_grew_short_is_another() -> None:
    """A pin says how long it was."""
    store = MemoryStore()
    [ref] = put(store, ("m/a.safetensors", ONE))
    with pytest.raises(PreconditionFailed, match="bytes, not"):
        identity.read(store, [replace(ref, size=ref.size + 1)])


def _raise(*_: object, **__: object) -> Iterator[bytes]:
    raise StorageUnavailable("no route")
