"""What every store does: memory, folder and S3 (a real SeaweedFS) pass the same tests."""

from __future__ import annotations

import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from weighbridge.storage import probe
from weighbridge.storage.errors import InvalidKey, ObjectNotFound, PreconditionFailed
from weighbridge.storage.pins import pin
from weighbridge.storage.probe import Call
from weighbridge.storage.protocols import Store

BIG = os.urandom(1 << 20) * 11 + b"end"  # three parts of an S3 upload, the last one short


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_an_object_is_read_back_as_it_was_put(any_store: Store) -> None:
    """Bytes, size and time come back; the time is in UTC; HEAD and LIST describe one content alike."""
    put = any_store.put("digits/run-1/model.safetensors", b"0123456789")
    assert any_store.get("digits/run-1/model.safetensors") == b"0123456789"
    head = any_store.head("digits/run-1/model.safetensors")
    assert head == put
    assert (head.key, head.size) == ("digits/run-1/model.safetensors", 10)
    assert head.modified.utcoffset() is not None
    assert [pin(info) for info in any_store.list()] == [pin(head)]


RANGES: list[tuple[int, int | None, bytes]] = [
    (0, None, b"0123456789"), (3, 6, b"345"), (7, None, b"789"), (7, 99, b"789"), (4, 4, b""), (10, None, b""),
    (42, 99, b""), (0, 0, b""),
]  # fmt: skip


def test_a_range_is_clamped_to_the_object(any_store: Store) -> None:
    """[start, end) is exact, and short or empty where the object ends sooner."""
    any_store.put("a", b"0123456789")
    for start, end, expected in RANGES:
        assert any_store.get("a", start=start, end=end) == expected
        with any_store.open("a", start=start, end=end) as stream:
            assert stream.read() == expected


def test_an_impossible_range_is_an_error(any_store: Store) -> None:
    """A negative start or an end before the start is the caller's mistake."""
    any_store.put("a", b"0123456789")
    for start, end in ((-1, None), (5, 4)):
        with pytest.raises(ValueError, match="range"):
            any_store.get("a", start=start, end=end)


def test_an_empty_object_is_an_object(any_store: Store) -> None:
    """Zero bytes can be put, listed and read, whole or by a range."""
    any_store.put("empty", b"")
    assert any_store.head("empty").size == 0
    assert any_store.get("empty") == any_store.get("empty", start=0, end=8) == b""
    assert keys(any_store) == ["empty"]


def test_a_missing_object_is_not_found(any_store: Store) -> None:
    """Get, head, ranges and copies of what is not there say so, and name it; deleting it is no error."""
    there = pin(any_store.put("other", b"x"))
    for read in (any_store.get, any_store.head, any_store.open):
        with pytest.raises(ObjectNotFound, match="nope"):
            read("nope/nothing")
    with pytest.raises(ObjectNotFound):
        any_store.get("nope", start=3, end=3)
    any_store.delete("nope")
    any_store.delete("other")
    with pytest.raises(ObjectNotFound):
        any_store.copy(there, "copy")


def test_a_pinned_read_fails_once_the_content_is_another(any_store: Store) -> None:
    """If-Match lets the pinned content through and refuses any other, for ranges, streams and copies too."""
    first = pin(any_store.put("a", b"first"))
    assert any_store.get("a", if_match=first) == b"first"
    any_store.put("a", b"other")
    for bounds in ((0, None), (2, 4), (3, 3)):
        with pytest.raises(PreconditionFailed):
            any_store.get("a", start=bounds[0], end=bounds[1], if_match=first)
    with pytest.raises(PreconditionFailed):
        any_store.open("a", if_match=first)
    with pytest.raises(PreconditionFailed):
        any_store.copy(first, "b")
    assert keys(any_store) == ["a"]


def test_put_if_none_match_never_overwrites(any_store: Store) -> None:
    """The second conditional put fails and changes nothing, for small and for multi-part objects."""
    for key, data in (("small", b"first"), ("big", BIG)):
        any_store.put(key, data, if_none_match=True)
        with pytest.raises(PreconditionFailed, match=key):
            any_store.put(key, io.BytesIO(data + b"!"), if_none_match=True)
        assert any_store.head(key).size == len(data)


def test_of_many_conditional_puts_one_wins(any_store: Store) -> None:
    """Eight writers at once: one succeeds, the others learn that they did not, and the winner's bytes stay."""

    def attempt(number: int) -> int | None:
        try:
            any_store.put("lock", b"%d" % number, if_none_match=True)
        except PreconditionFailed:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(attempt, range(8)) if number is not None]
    assert [b"%d" % number for number in winners] == [any_store.get("lock")]


def test_a_put_that_breaks_off_leaves_nothing(any_store: Store) -> None:
    """A source that fails in the middle leaves the old object, or none; no part of it is ever seen."""

    class Breaking(io.RawIOBase):
        left = 12 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            if self.left <= 0:
                raise RuntimeError("the source broke")
            self.left -= len(buffer)
            return len(buffer)

    any_store.put("old", b"old")
    for key in ("old", "new"):
        with pytest.raises(RuntimeError, match="broke"):
            any_store.put(key, Breaking())  # type: ignore[arg-type]
    assert keys(any_store) == ["old"]
    assert any_store.get("old") == b"old"


def test_large_objects_go_in_and_out_as_streams(any_store: Store, tmp_path: Path) -> None:
    """A stream, and a file by its path, of more than two parts come back bit for bit, whole and by ranges."""
    source = tmp_path / "source"
    source.write_bytes(BIG)
    any_store.put("from/path", source)
    with source.open("rb") as stream:
        any_store.put("from/stream", stream)
    for key in ("from/path", "from/stream"):
        assert any_store.head(key).size == len(BIG)
        with any_store.open(key, start=5) as stream:
            buffer = bytearray(len(BIG))
            filled = 0
            while count := stream.readinto(memoryview(buffer)[filled:]):  # type: ignore[attr-defined]
                filled += count
        assert bytes(buffer[:filled]) == BIG[5:]
    assert any_store.get("from/path", start=len(BIG) - 3) == b"end"


def test_a_stream_never_mixes_two_contents(any_store: Store) -> None:
    """An object replaced while it is read gives its old bytes to the end, or PreconditionFailed; never a mix."""
    old, new = b"o" * len(BIG), b"n" * len(BIG)
    any_store.put("a", old)
    with any_store.open("a") as stream:
        seen = stream.read(1000)
        any_store.put("a", new)
        try:
            seen += stream.read()
        except PreconditionFailed:
            return
    assert seen == old


def test_a_copy_has_the_pinned_bytes(any_store: Store) -> None:
    """A copy within the store equals its source and lives on without it."""
    source = pin(any_store.put("a", BIG))
    any_store.copy(source, "deep/er/b")
    any_store.delete("a")
    assert any_store.get("deep/er/b") == BIG


def test_lists_by_prefix_with_folders_together(any_store: Store) -> None:
    """A prefix may end within a name; every folder's objects come in one run."""
    names = ["run-1/a", "run-1/sub/b", "run-10/a", "run-1.json", "other/x", "späße/ü +%41.bin"]
    for name in names:
        any_store.put(name, name.encode())
    assert sorted(keys(any_store)) == sorted(names)
    assert sorted(keys(any_store, "run-1/")) == ["run-1/a", "run-1/sub/b"]
    assert sorted(keys(any_store, "run-1")) == sorted(n for n in names if n.startswith("run-1"))
    assert keys(any_store, "nothing") == keys(any_store, "nothing/at/all/") == keys(any_store, "run-1/a/") == []
    folders = [key.split("/")[0] for key in keys(any_store)]
    assert len([*itertools.groupby(folders)]) == len(set(folders))


def test_one_level_has_objects_and_common_prefixes(any_store: Store) -> None:
    """Entries show what is directly under a prefix; deeper objects show as their folder, once."""
    for name in ("digits/a.safetensors", "digits/run/x", "digits/run/y", "digits/run/z/w", "top"):
        any_store.put(name, b"1")
    root = {entry.key: entry.info for entry in any_store.entries()}
    assert root["digits/"] is None
    assert root["top"] == any_store.head("top")
    assert sorted(root) == ["digits/", "top"]
    assert sorted(e.key for e in any_store.entries("digits/")) == ["digits/a.safetensors", "digits/run/"]
    assert list(any_store.entries("nothing/")) == []
    with pytest.raises(ValueError, match="end in"):
        list(any_store.entries("dig"))


def test_deleted_is_gone(any_store: Store) -> None:
    """After a delete the object is neither read nor listed, and can be put anew."""
    any_store.put("a/b", b"1")
    any_store.delete("a/b")
    assert keys(any_store) == []
    any_store.put("a/b", b"2", if_none_match=True)
    assert any_store.get("a/b") == b"2"


INVALID_KEYS = [
    "", "/etc/passwd", "../up", "a/../../up", "a/./b", "a//b", "a/", ".", "..", "a\\b", "..\\up", "a\0b",
    "a/.weighbridge-1234", "\udcff", "x" * 1025,
]  # fmt: skip


def test_invalid_keys_are_refused_by_every_verb(any_store: Store) -> None:
    """No key leads out of the store: each verb refuses it before anything is touched."""
    good = pin(any_store.put("good", b"x"))
    for key in INVALID_KEYS:
        for verb in (any_store.get, any_store.open, any_store.head, any_store.delete):
            with pytest.raises(InvalidKey):
                verb(key)
        with pytest.raises(InvalidKey):
            any_store.put(key, b"x")
        with pytest.raises(InvalidKey):
            any_store.copy(good, key)
    assert keys(any_store) == ["good"]


def test_invalid_prefixes_are_refused(any_store: Store) -> None:
    """A listing cannot leave the store either."""
    for prefix in ("/", "../", "a/../", "a\\", "a\0/"):
        with pytest.raises(InvalidKey):
            list(any_store.list(prefix))
        with pytest.raises(ValueError, match="prefix"):
            list(any_store.entries(prefix))


def test_a_store_says_where_it_is_and_that_it_answers(any_store: Store) -> None:
    """The URL names the place without secrets; `check` passes on a healthy store."""
    assert any_store.url.split("://")[0] in ("memory", "file", "s3")
    assert "weighbridge" not in any_store.url.lower() or any_store.url.startswith("file")
    any_store.check()


def test_every_call_that_the_doctor_tries_works_and_leaves_nothing(any_store: Store) -> None:
    """Those that read, on what is there; those that write, on scratch objects that are gone afterwards."""
    any_store.put("digits/a.safetensors", b"0123456789")
    tries = [*probe.reading(any_store, "digits/"), *probe.writing(any_store, "digits/")]
    assert [tried for tried in tries if tried.error is not None] == []
    assert {Call.LIST, Call.READ, Call.WRITE, Call.ONCE, Call.RENAME, Call.DELETE} <= {tried.call for tried in tries}
    assert keys(any_store) == ["digits/a.safetensors"]
