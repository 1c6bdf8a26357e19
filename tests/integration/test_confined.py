"""A stage in a confined child: what it may see, what ends it, and whose failure each end is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fixtures.checkpoints import raw, safetensors
from fixtures.confined import Bench
from fixtures.engines import make_checkpoint
from fixtures.worker import runs, until

from weighbridge.storage.errors import PreconditionFailed, StorageUnavailable
from weighbridge.workers.bindings import Programs, TemplateInfo
from weighbridge.workers.confined.confine import Confine, Exceeded
from weighbridge.workers.confined.order import Limits
from weighbridge.workers.desk import OwnDesk
from weighbridge.workers.ours import ChildDied, ChildFailed

TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


class Watched(OwnDesk):
    """A desk that does something the first time that its child asks for bytes, which is while it reads."""

    then: Callable[[int], None]

    def get(self, key: str, **more: Any) -> bytes:
        parent = psutil.Process(self.nursery_pid)
        for child in parent.children():
            self.then(child.pid)
        return super().get(key, **more)


def watched(bench: Bench, then: Callable[[int], None]) -> Any:
    """Weigh a small checkpoint, with `then` called on the child's id while it reads."""
    (bench.drops / "a.safetensors").write_bytes(safetensors())
    task = bench.task("a.safetensors")
    desk = Watched(bench.source, bench.blobs, bench.path, bench.root, files=task.files)
    desk.nursery_pid, desk.then = bench.nursery.pid, then
    return Confine(bench.nursery.orders, Limits()).perform(task, desk, lambda: None)


def test_a_checkpoint_is_weighed_in_a_child_as_it_is_here(bench: Bench, digits_template: Any) -> None:
    """The same verdict, and its blobs are in the store that the child never saw."""
    bench.blobs.put_bytes(digits_template.pt2)
    made = digits_template
    known = TemplateInfo("digits", made.digest, made.fingerprint, made.parameters, made.inputs, made.outputs)
    make_checkpoint(bench.drops / "a.safetensors")
    seen = bench.weigh("a.safetensors", programs=Programs((known,)))
    assert (seen.verdict, seen.reason) == ("passed", "9 tensors, finite, bound to template:digits")
    assert all(map(bench.blobs.exists, seen.facts["blobs"]))


def test_a_child_has_no_secret(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment has none of ours, and its open files are its own socket and where it writes its log."""
    monkeypatch.setenv("WEIGHBRIDGE_REGISTRY__TOKEN", "canary")
    seen: dict[str, Any] = {}

    def look(pid: int) -> None:
        seen["environ"] = Path(f"/proc/{pid}/environ").read_bytes()
        links = {int(link.name): os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        seen["open"] = {number: where for number, where in links.items() if number > 2}

    watched(bench, look)
    assert b"WEIGHBRIDGE_" not in seen["environ"]
    assert b"AWS_" not in seen["environ"]
    assert [where.partition(":")[0] for where in seen["open"].values()] == ["socket"]


def test_what_takes_too_long_to_read_is_the_checkpoints_own_doing(bench: Bench) -> None:
    """A header of many tensors under a limit of a blink: Exceeded, with the number, and the heartbeat went on."""
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}
    (bench.drops / "many.safetensors").write_bytes(raw(header))
    beats: list[float] = []
    with pytest.raises(Exceeded, match=r"more than 0\.2 s of a processor"):
        bench.weigh("many.safetensors", limits=Limits(cpu_seconds=0.2), beat=lambda: beats.append(time.monotonic()))
    assert beats


def test_what_takes_too_much_memory_to_read_is_too(bench: Bench) -> None:
    """The kernel refuses it more, the child says so, and nobody else has less."""
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}
    (bench.drops / "many.safetensors").write_bytes(raw(header))
    with pytest.raises(Exceeded, match="more than 33,554,432 bytes of memory"):
        bench.weigh("many.safetensors", limits=Limits(memory_bytes=32 << 20))


@pytest.mark.parametrize(
    ("number", "whose"),
    [
        (signal.SIGSEGV, Exceeded),
        (signal.SIGABRT, Exceeded),
        (signal.SIGKILL, ChildDied),
        (signal.SIGTERM, ChildDied),
        (signal.SIGBUS, ChildDied),
    ],
)
def test_whose_doing_the_end_of_a_child_is(bench: Bench, number: signal.Signals, whose: type[Exception]) -> None:
    """A parser that crashes met something hostile; who is killed from outside, or lost a page of a disk, did not."""
    with pytest.raises(whose, match=number.name):
        watched(bench, lambda pid: os.kill(pid, number))


def test_what_the_store_says_reaches_the_stage_and_what_is_away_ends_it(bench: Bench) -> None:
    """Changed content is a verdict; a store that is away is no matter of the child's, and is tried again."""
    (bench.drops / "a.safetensors").write_bytes(safetensors())

    def failing(error: Exception) -> OwnDesk:
        class Failing(OwnDesk):
            def get(self, key: str, **more: Any) -> bytes:
                raise error

        return Failing(bench.source, bench.blobs, bench.path, bench.root, files=task.files)

    task, confine = bench.task("a.safetensors"), Confine(bench.nursery.orders, Limits())
    gone = confine.perform(task, failing(PreconditionFailed("another etag", key="a.safetensors")), lambda: None)
    assert gone.verdict == "superseded"
    with pytest.raises(StorageUnavailable, match="503"):
        confine.perform(task, failing(StorageUnavailable("503")), lambda: None)


def test_a_child_reads_the_files_of_its_checkpoint_alone(bench: Bench) -> None:
    """Whatever has become of it: keys without a pin of this checkpoint are not for it."""
    (bench.drops / "a.safetensors").write_bytes(safetensors())
    (bench.drops / "b.safetensors").write_bytes(safetensors())
    mine, others = bench.task("a.safetensors"), bench.task("b.safetensors")
    stolen = replace(mine, path="b.safetensors", files=others.files)
    with pytest.raises(ChildFailed, match=r"b\.safetensors is no file of this checkpoint"):
        Confine(bench.nursery.orders, Limits()).perform(stolen, bench.desk(mine), lambda: None)


def test_what_the_heartbeat_raises_ends_the_child(bench: Bench) -> None:
    """Who lost the job stops at once, also in the middle of a computation, and leaves no process behind."""
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}
    (bench.drops / "many.safetensors").write_bytes(raw(header))

    class Lost(Exception):
        pass

    def lost() -> None:
        raise Lost

    with pytest.raises(Lost):
        bench.weigh("many.safetensors", beat=lost)
    until("no child is left", lambda: not psutil.Process(bench.nursery.pid).children())


def test_a_nursery_that_is_killed_is_started_again(bench: Bench) -> None:
    """The child under way ends with it, by no fault of the checkpoint's; later orders wait for the next."""
    before = bench.nursery.pid

    def kill(child: int) -> None:
        os.kill(before, signal.SIGKILL)
        until("the child ends with it", lambda: not runs(child))

    with pytest.raises(ChildDied):
        watched(bench, kill)
    until("it is gone", lambda: not runs(before))
    bench.nursery.keep()
    until("there is another", lambda: bench.nursery.keep() or bench.nursery.pid != before)
    assert watched(bench, lambda _: None).verdict == "needs_binding"


def test_a_quadratic_configuration_costs_nothing(bench: Bench) -> None:
    """A config.json of newlines (it stopped every validation for good) is read by nobody, and is no fault."""
    folder = bench.drops / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(raw({"w": TENSOR}, b"\0\0\x80?"))
    for name, text in {
        "config.json": b"\n" * (1 << 20),
        "a.yaml": b'{,-"' * (1 << 18),
        "b.yaml": b"auto_map " * 99_999,
        "c.yaml": b"x: 1\n  - auto_map: {}",
    }.items():
        (folder / name).write_bytes(text)
    outcome = bench.weigh("run/", limits=Limits(cpu_seconds=3))
    assert outcome.verdict == "needs_binding"
    assert [file["path"] for file in outcome.facts["files"]] == ["model.safetensors"]
