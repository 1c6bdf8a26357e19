"""Switching versions under load, and children that crash, hang or never come up. Real processes, no torch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
from fixtures.fake_engine import FakeSession
from fixtures.serving import FAKE, FAKE_PROGRAM, Host, engine_children, fake_spec, serving_host, stop, until
from fixtures.worker import runs

from weighbridge.hosts.blame import Blame
from weighbridge.hosts.children import Child, Nursery
from weighbridge.hosts.errors import LoadFailed, ModelNotFound, NotReady
from weighbridge.hosts.router import Slot, State
from weighbridge.hosts.settings import HostSettings

CRASH, ENDLESS, TIRED_AFTER = FakeSession.CRASH, FakeSession.ENDLESS, FakeSession.TIRED_AFTER


def run(test: Callable[[Host, httpx.AsyncClient], Awaitable[None]], blobs: Path, settings: HostSettings = FAKE) -> None:
    async def body() -> None:
        async with serving_host(blobs, settings) as host, httpx.AsyncClient(base_url=f"http://{host.url}") as http:
            await test(host, http)

    asyncio.run(asyncio.wait_for(body(), 90))


async def infer(http: httpx.AsyncClient, *data: float) -> httpx.Response:
    body = {"inputs": [{"name": "x", "shape": [1, len(data)], "datatype": "FP32", "data": data}]}
    return await http.post("/v2/models/scale/infer", json=body)


def live(host: Host) -> Slot:
    return host.slots.find("scale", None)


@contextlib.asynccontextmanager
async def held(slot: Slot) -> AsyncIterator[None]:
    """Its child stands still: what is asked meanwhile waits, for as long as the block takes."""
    assert slot.child is not None
    process = await stop(slot.child)
    try:
        yield
    finally:
        process.resume()


@pytest.mark.slow
def test_no_request_fails_while_versions_switch(tmp_path: Path) -> None:
    """Six swaps under constant load: every answer is right for the version that it names, and all six are seen."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        seen: list[tuple[int, str, list[float]]] = []
        done = False

        async def ask() -> None:
            while not done:
                answer = await infer(http, 1, 2)
                output = answer.json()
                seen.append((answer.status_code, output["model_version"], output["outputs"][0]["data"]))

        clients = [asyncio.create_task(ask()) for _ in range(4)]
        for version in range(2, 8):
            await host.put_live(str(version))
            await until(lambda: seen and seen[-1][1] == live(host).spec.version)
        done = True
        await asyncio.gather(*clients)
        assert {status for status, _, _ in seen} == {200}
        assert all(data == [float(version), 2.0 * float(version)] for _, version, data in seen)
        assert {version for _, version, _ in seen} == {str(number) for number in range(1, 8)}

    run(body, tmp_path)


def test_a_request_in_flight_finishes_on_the_version_that_took_it(tmp_path: Path) -> None:
    """The old child ends only when its last request is answered; here nothing keeps it as previous."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        old = live(host)
        loaded = await host.swapper.load(fake_spec(host.blobs, "2"))
        async with held(old):
            slow = asyncio.create_task(infer(http, 1))
            await until(lambda: old.in_flight)
            await host.swapper.go_live(loaded)
            assert (await infer(http, 1)).json()["model_version"] == "2"
            assert old.state is State.UNLOADING
            assert old.child is not None
            assert old.child.alive
        assert (await slow).json()["model_version"] == "1"
        await until(lambda: not old.child.alive)

    run(body, tmp_path, FAKE.model_copy(update={"keep_previous": False}))


def test_rolling_back_is_instant_because_the_previous_child_is_resident(tmp_path: Path) -> None:
    """Roll back needs no load; going forward again neither; the one before the previous is gone."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        for version in "123":
            await host.put_live(version)
        await host.swapper.roll_back("scale")
        assert (await infer(http, 1)).json()["model_version"] == "2"
        await host.swapper.roll_back("scale")
        assert (await infer(http, 1)).json()["model_version"] == "3"
        await until(lambda: {slot.spec.version for slot in host.slots} == {"2", "3"})

    run(body, tmp_path)


def test_two_variants_of_one_version_can_be_resident(tmp_path: Path) -> None:
    """Moving to a better variant of the same version is a swap like any other."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        await host.swapper.go_live(await host.swapper.load(fake_spec(host.blobs, "1", variant="bf16")))
        answer = await infer(http, 1)
        assert answer.headers["weighbridge-variant"] == "bf16"
        await host.swapper.roll_back("scale")
        assert (await infer(http, 1)).headers["weighbridge-variant"] == "original"

    run(body, tmp_path)


@pytest.mark.parametrize(("program", "words"), [("broken", "tensor 'w' is missing"), ("liar-2", "differs by up to")])
def test_a_version_that_does_not_come_up_leaves_the_live_one_alone(tmp_path: Path, program: str, words: str) -> None:
    """A failed load or golden check raises LoadFailed with the reason; nothing of it stays."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        with pytest.raises(LoadFailed, match=words):
            await host.put_live("2", program)
        assert (await infer(http, 1)).json()["model_version"] == "1"
        assert [slot.spec.version for slot in host.slots] == ["1"]

    run(body, tmp_path)


def test_a_missing_blob_and_a_first_load_that_fails(tmp_path: Path) -> None:
    """The message names the blob; the model stays unknown."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        spec = fake_spec(tmp_path, "1")
        digest = spec.manifest.golden.digest
        (tmp_path / digest[:2] / digest).unlink()
        with pytest.raises(LoadFailed, match=digest):
            await host.swapper.load(spec)
        with pytest.raises(ModelNotFound):
            live(host)
        assert (await infer(http, 1)).status_code == 404

    run(body, tmp_path)


def test_a_child_that_crashes_fails_its_request_cleanly_and_is_brought_up_again(tmp_path: Path) -> None:
    """What crashed it gets a 503 error object; the others that it held, and the next ones, a new child answers."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        first = live(host).child
        async with held(live(host)):
            other, crash = asyncio.create_task(infer(http, 1)), asyncio.create_task(infer(http, CRASH))
            await until(lambda: live(host).in_flight == 2)
        answer = await crash
        assert answer.status_code == 503
        assert "ended while it computed this request" in answer.json()["error"]
        assert (await other).status_code == 200
        assert live(host).statistics.blamed == {Blame.INPUT: 1}
        await until(lambda: live(host).state is State.READY)
        assert live(host).child is not first
        assert (await infer(http, 3)).json()["outputs"][0]["data"] == [3.0]

    run(body, tmp_path)


def test_a_child_killed_while_idle_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to ask: the slot is UNAVAILABLE, then READY again; who asks meanwhile waits, and is answered."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        slot = live(host)
        assert slot.child is not None
        spares, let_go = host.swapper._spares, asyncio.Event()
        take = spares.take

        async def held() -> Child:  # a forked spare is there too soon to see anything wait for it
            await let_go.wait()
            return await take()

        monkeypatch.setattr(spares, "take", held)
        os.kill(slot.child.pid, signal.SIGKILL)
        await until(lambda: slot.state is State.UNAVAILABLE)
        assert (await http.get("/v2/models/scale/ready")).status_code == 400
        waits = asyncio.create_task(infer(http, 1))
        await until(lambda: slot.waiting)
        with pytest.raises(NotReady):
            await host.swapper.go_live(slot)
        let_go.set()
        assert (await waits).status_code == 200
        assert slot.state is State.READY

    run(body, tmp_path)


def test_who_waits_for_a_dead_version_gets_the_next_one_or_a_reason(tmp_path: Path) -> None:
    """A switch lets the waiting go to the version that is live by then; past the deadline the reason is told."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        slot = live(host)
        second = await host.swapper.load(fake_spec(host.blobs, "2"))
        digest = slot.spec.manifest.golden.digest
        (host.blobs / digest[:2] / digest).unlink()
        assert slot.child is not None
        slot.child.kill()
        await until(lambda: "did not start" in (slot.reason or ""))
        answer = await infer(http, 1)
        assert (answer.status_code, digest in answer.json()["error"]) == (503, True)
        assert slot.statistics.blamed == {Blame.NOBODY: 1}
        waits = asyncio.create_task(infer(http, 1))
        await until(lambda: slot.waiting)
        await host.swapper.go_live(second)
        assert (await waits).json()["model_version"] == "2"
        assert [held.spec.version for held in host.slots] == ["2"]

    run(body, tmp_path, FAKE.model_copy(update={"request_seconds": 2}))


def test_a_load_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    """Cancelled while the spare starts, or while it loads: no slot, no child but a spare."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        for given_up_at in ("spare", "load"):
            load = asyncio.create_task(host.swapper.load(fake_spec(host.blobs, "1", "slow-1")))
            await until(lambda: list(host.slots))
            if given_up_at == "load":
                await until((host.blobs / "loading").exists)
            load.cancel()
            await asyncio.wait((load,))
            assert load.cancelled()
            assert list(host.slots) == []
        await host.put_live("1")
        await until(lambda: len(engine_children()) == 2)

    before = engine_children()
    run(body, tmp_path, FAKE.model_copy(update={"request_seconds": 20}))
    assert engine_children() == before


def test_memory_that_is_short_costs_the_previous_version(tmp_path: Path) -> None:
    """What was live before stays only while one more copy would fit; a load frees it first."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        free = [0]
        host.swapper._available = lambda: free[0]
        for version in "12":
            await host.put_live(version)
        assert host.swapper.previous("scale") is None
        free[0] = 1
        await host.put_live("3")
        assert host.swapper.previous("scale") is not None
        free[0] = 0
        loading = asyncio.create_task(host.swapper.load(fake_spec(host.blobs, "4")))
        await until(lambda: {slot.spec.version for slot in host.slots} == {"3", "4"})
        await loading

    run(body, tmp_path)


def test_a_child_that_hangs_is_replaced(tmp_path: Path) -> None:
    """Past the deadline the client gets 504; a child that is silent for longer than `hang` is killed."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        hung = live(host).child
        assert hung is not None
        await stop(hung)
        answer = await infer(http, 1)
        assert (answer.status_code, list(answer.json())) == (504, ["error"])
        assert live(host).statistics.blamed == {Blame.VERSION: 1}
        await until(lambda: live(host).child not in (hung, None))
        assert (await infer(http, 1)).status_code == 200

    run(body, tmp_path, FAKE.model_copy(update={"request_seconds": 1, "hang_seconds": 0.5}))


@pytest.mark.slow
@pytest.mark.parametrize(("request_seconds", "hang_seconds"), [(10, 1), (1, 2)], ids=["ended", "late"])
def test_what_takes_too_long_to_compute_may_be_the_clients_fault(
    tmp_path: Path, request_seconds: float, hang_seconds: float
) -> None:
    """A child that computes is no version that hangs: other inputs may be quick. It is ended all the same."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        busy = live(host).child
        answer = await infer(http, ENDLESS)
        assert (answer.status_code, list(answer.json())) == (504, ["error"])
        assert "computed" in answer.json()["error"]
        assert live(host).statistics.blamed == {Blame.INPUT: 1}
        await until(lambda: live(host).child not in (busy, None))
        assert (await infer(http, 1)).status_code == 200

    run(body, tmp_path, FAKE.model_copy(update={"request_seconds": request_seconds, "hang_seconds": hang_seconds}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "asked", "fault"),
    [("endless-2", FakeSession.SEVEN, Blame.VERSION), ("times-2", ENDLESS, Blame.CLIENT)],
    ids=["new", "both"],
)
def test_what_takes_too_long_is_asked_again_of_the_version_before(
    tmp_path: Path, program: str, asked: float, fault: Blame
) -> None:
    """What that one answers, the new one should have; what takes it too long as well lies in the request."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        await host.put_live("2", program)
        assert (await infer(http, asked)).status_code == 504
        await until(lambda: live(host).statistics.blamed == {fault: 1})

    run(body, tmp_path, FAKE.model_copy(update={"request_seconds": 0.5, "hang_seconds": 2}))


def test_no_thread_is_left_when_children_are_forked() -> None:
    """What a thread holds at a fork is locked in the child for ever; joining it does not mean that it has ended."""

    async def body() -> None:
        nursery = Nursery(FAKE, replace(FAKE_PROGRAM, preload="fixtures.fake_engine:linger"))
        child = await Child.start(nursery)
        try:
            assert len(psutil.Process(psutil.Process(child.pid).ppid()).threads()) == 1
        finally:
            await child.end()
            await nursery.close()

    asyncio.run(body())


@pytest.mark.slow
def test_a_load_that_stands_still_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Long before the longest load, only where it neither computes nor reads, and it says where; what serves stays."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        with pytest.raises(LoadFailed, match=r"scale version 2 .*neither computed nor read anything for"):
            await host.swapper.load(fake_spec(host.blobs, "2", "slow-2"))
        assert re.search(r"fake_engine\.py\", line \d+ in load", capfd.readouterr().err)
        assert (await infer(http, 1)).json()["model_version"] == "1"
        await host.put_live("3", "toiling-3")
        await host.put_live("4", "reading-4")
        assert (await infer(http, 1)).json()["model_version"] == "4"

    run(body, tmp_path, FAKE.model_copy(update={"load_seconds": 600, "hang_seconds": 1.5}))


def test_requests_that_wait_are_computed_as_one(tmp_path: Path) -> None:
    """Each gets its own rows or its own fault: other shapes, too many rows, wrong names and no rows among them."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("2")
        asked = [[1.0], [2.0], [3.0, 4.0], [5.0], [6.0, 7.0]]
        wrong = {"name": "nonsense", "shape": [1, 1], "datatype": "FP32", "data": [1]}
        rows = {"name": "x", "shape": [9, 1], "datatype": "FP32", "data": list(range(9))}
        async with held(live(host)):
            fine = [asyncio.create_task(infer(http, *data)) for data in asked]
            bad, many = (
                asyncio.create_task(http.post("/v2/models/scale/infer", json={"inputs": [tensor]}))
                for tensor in (wrong, rows)
            )
            await until(lambda: live(host).in_flight == 7)
        assert [(await task).json()["outputs"][0]["data"] for task in fine] == [[2 * x for x in row] for row in asked]
        assert (await bad).status_code == 400
        assert (await many).json()["outputs"][0]["shape"] == [9, 1]

    run(body, tmp_path, FAKE.model_copy(update={"batch": 8}))


def test_a_queue_that_is_full_refuses_at_once(tmp_path: Path) -> None:
    """Beyond `queue` waiting requests the answer is 503 and not a longer wait."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        async with held(live(host)):
            waiting = [asyncio.create_task(infer(http, 1)) for _ in range(2)]
            await until(lambda: live(host).in_flight == 2)
            answer = await infer(http, 1)
        assert answer.status_code == 503
        assert "already wait" in answer.json()["error"]
        assert [(await task).status_code for task in waiting] == [200, 200]

    run(body, tmp_path, FAKE.model_copy(update={"queue": 2}))


def test_a_request_that_expired_in_the_queue_is_not_computed(tmp_path: Path) -> None:
    """The child drops what nobody waits for, so that an overload does not feed itself."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1", "tiring-1")
        async with held(live(host)):
            answers = await asyncio.gather(*(infer(http, 1) for _ in range(TIRED_AFTER)))
        assert {answer.status_code for answer in answers} == {504}
        async with asyncio.timeout(10):
            while (answer := await infer(http, 1)).status_code == 504:  # a busy machine may take so long for one
                pass
        assert answer.status_code == 200, "it did not tire of what nobody waited for"

    run(body, tmp_path, FAKE.model_copy(update={"request_seconds": 0.45, "hang_seconds": 60}))


def test_nothing_is_left_running(tmp_path: Path) -> None:
    """Live, previous and spare children end with the host."""
    pids: list[int] = []

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        for version in "12":
            await host.put_live(version)
        pids.extend(engine_children())
        assert len(pids) >= 2

    run(body, tmp_path)
    assert not [pid for pid in pids if runs(pid)]


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """kill -9 of the front leaves no engine child behind, and a child sees no secret of its parent's environment."""
    code = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[1])\n"
        "from fixtures.serving import FAKE, FAKE_PROGRAM\n"
        "from weighbridge.hosts.children import Child, Nursery\n"
        "async def main():\n"
        "    child = await Child.start(Nursery(FAKE, FAKE_PROGRAM))\n"
        "    print(child.pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )

    async def body() -> None:
        parent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code,
            str(Path(__file__).parents[1]),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "WEIGHBRIDGE_TOKEN": "canary-secret"},
        )
        assert parent.stdout is not None
        pid = int(await parent.stdout.readline())
        assert "WEIGHBRIDGE_TOKEN" not in psutil.Process(pid).environ()
        parent.kill()
        await parent.wait()
        await until(lambda: not runs(pid))

    asyncio.run(asyncio.wait_for(body(), 90))
