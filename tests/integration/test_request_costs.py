"""What a request may take of a real engine child: blocks between which others pass, refusals with what fits, limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fixtures.real_engine import ROWS, TOKENS, TORCH, TORCH_PROGRAM, attention, torch_spec, wide
from fixtures.serving import FAKE, FAKE_PROGRAM, Host, fake_spec, serving_host, stop, until

from weighbridge.hosts.blame import Blame
from weighbridge.hosts.children import ChildProgram
from weighbridge.hosts.settings import HostSettings

MB = 1 << 20
Test = Callable[[Host, httpx.AsyncClient], Awaitable[None]]


def run(test: Test, folder: Path, settings: HostSettings, program: ChildProgram) -> None:
    async def body() -> None:
        async with (
            serving_host(folder, settings, program) as host,
            httpx.AsyncClient(base_url=f"http://{host.url}", timeout=100) as http,
        ):
            await test(host, http)

    asyncio.run(asyncio.wait_for(body(), 150))


def body_of(x: np.ndarray[Any, Any], *, nested: bool = False) -> bytes:
    datatype = "INT64" if x.dtype.kind == "i" else "FP32"
    data = x.tolist() if nested else x.ravel().tolist()
    return json.dumps({"inputs": [{"name": "x", "shape": x.shape, "datatype": datatype, "data": data}]}).encode()


def answered(answer: httpx.Response) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    output = answer.json()["outputs"][0]
    return np.array(output["data"], np.float32).reshape(output["shape"])


pytestmark = pytest.mark.slow


def test_short_requests_pass_a_large_one(tmp_path: Path) -> None:
    """One row is answered many times while thousands are computed; the rows of the large answer are those of small
    ones within the golden's tolerance; and memory stays far below what all rows at once would take."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 16)).astype(np.float32)

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.swapper.go_live(await host.swapper.load(torch_spec(tmp_path, "1", wide, ROWS)))
        path, passed = "/v2/models/real/infer", 0
        large = asyncio.create_task(http.post(path, content=body_of(x, nested=True)))
        while not large.done():
            assert answered(await http.post(path, content=body_of(x[:1]))).shape == (1, 4)
            passed += not large.done()
        y = answered(await large)
        assert passed >= 3
        for row in (0, 1999, 3999):
            one = answered(await http.post(path, content=body_of(x[row : row + 1])))
            np.testing.assert_allclose(y[row : row + 1], one, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(y, answered(await http.post(path, content=body_of(x))))

    run(body, tmp_path, TORCH, TORCH_PROGRAM)


def test_what_does_not_fit_is_refused_with_what_does(tmp_path: Path) -> None:
    """A length whose attention does not fit: 413 before anything is computed, with the length that fits; that one is
    answered. Many short rows pass in blocks. A refusal counts as one, and the child lives on."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.swapper.go_live(await host.swapper.load(torch_spec(tmp_path, "1", attention, TOKENS)))
        slot = host.slots.find("real", None)
        child, path = slot.child, "/v2/models/real/infer"
        refused = await http.post(path, content=body_of(np.ones((1, 40_000), np.int64)))
        assert refused.status_code == 413
        fitting = int(refused.json()["error"].split("at most ")[1].split()[0])
        assert 500 < fitting < 6000
        answered(await http.post(path, content=body_of(np.ones((1, fitting), np.int64))))
        assert answered(await http.post(path, content=body_of(np.ones((300, 300), np.int64)))).shape == (300, 4)
        assert slot.statistics.blamed == {Blame.REFUSED: 1}
        assert slot.child is child

    run(body, tmp_path, TORCH.model_copy(update={"request_memory_bytes": 200 * MB}), TORCH_PROGRAM)


def test_memory_that_was_not_foreseen_ends_at_the_childs_limit(tmp_path: Path) -> None:
    """An allocation beyond it fails: 413 for the request that asked for it; neighbours, those of the same shape too,
    and the child live on."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        slot = host.slots.find("scale", None)
        child, path = slot.child, "/v2/models/scale/infer"
        hungry = body_of(np.full((1, 4), -9000, np.float32))
        answers = await asyncio.gather(*(http.post(path, content=hungry) for _ in range(3)))
        assert {answer.status_code for answer in answers} == {413}
        assert answered(await http.post(path, content=body_of(np.ones((1, 4), np.float32)))).tolist() == [[1] * 4]
        assert slot.child is child

    run(body, tmp_path, FAKE.model_copy(update={"request_memory_bytes": 64 * MB}), FAKE_PROGRAM)


@pytest.mark.slow
def test_a_queue_that_never_moves_is_seen_and_moved(tmp_path: Path) -> None:
    """A child that is stopped: the host is not ready while it hangs, the child is replaced though nobody's deadline is
    near, who it never came to is answered by the next one, and the hang is the version's fault."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        slot = host.slots.find("scale", None)
        child, path = slot.child, "/v2/models/scale/infer"
        assert child is not None
        await stop(child)
        one = body_of(np.ones((1, 4), np.float32))
        asked = [asyncio.create_task(http.post(path, content=one)) for _ in range(3)]
        await until(lambda: child.waiting == 3)
        readiness = set()
        while not all(task.done() for task in asked):
            readiness.add((await http.get("/v2/health/ready")).status_code)
            await asyncio.sleep(0.01)
        assert sorted(task.result().status_code for task in asked) == [200, 200, 504]
        assert 400 in readiness
        assert (await http.get("/v2/health/ready")).status_code == 200
        assert slot.child is not child
        assert slot.statistics.blamed == {Blame.VERSION: 1}

    run(body, tmp_path, FAKE.model_copy(update={"request_seconds": 60, "hang_seconds": 5.0}), FAKE_PROGRAM)


def test_a_request_that_cannot_be_framed_leaves_nothing(tmp_path: Path) -> None:
    """Whatever is wrong with a question, it waits only once it is sent."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.put_live("1")
        child = host.slots.find("scale", None).child
        assert child is not None
        from weighbridge.hosts.frames import Kind

        for meta in ({"header": 2**65}, {"header": object()}):
            with pytest.raises(TypeError):
                child.send(Kind.INFER, meta)
        assert child.waiting == 0

    run(body, tmp_path, FAKE, FAKE_PROGRAM)


def test_the_deadline_ends_a_large_request_and_not_its_neighbours(tmp_path: Path) -> None:
    """A thousand blocks too many: 504 at its deadline, by then its work ends; those beside it are answered."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        await host.swapper.go_live(await host.swapper.load(torch_spec(tmp_path, "1", wide, ROWS)))
        slot, path = host.slots.find("real", None), "/v2/models/real/infer"
        child = slot.child
        assert child is not None
        large = asyncio.create_task(http.post(path, content=body_of(np.ones((60_000, 16), np.float32))))
        one = body_of(np.ones((1, 16), np.float32))
        while not large.done():
            assert (await http.post(path, content=one)).status_code == 200
        assert (await large).status_code == 504
        await until(lambda: child.waiting == 0)
        assert slot.child is child
        assert slot.statistics.blamed == {Blame.INPUT: 1}

    run(body, tmp_path, TORCH.model_copy(update={"request_seconds": 4, "hang_seconds": 30}), TORCH_PROGRAM)


def test_a_version_that_joins_takes_no_readiness(tmp_path: Path) -> None:
    """While a new model loads, and when it cannot: who serves stays ready. One that has served counts from then on."""

    async def body(host: Host, http: httpx.AsyncClient) -> None:
        async def ready() -> int:
            return (await http.get("/v2/health/ready")).status_code

        slots = host.slots
        slots.expected = None
        assert await ready() == 400
        slots.assign(frozenset({"scale", "broken"}), certain=True)
        assert await ready() == 400
        await host.put_live("1")
        assert await ready() == 400  # this process was started for both
        slots.give_up("broken")
        assert await ready() == 200
        slots.assign(frozenset({"scale", "broken", "other"}), certain=True)
        loading = asyncio.create_task(host.swapper.load(fake_spec(host.blobs, "1", "slow-1", model="other")))
        await until((host.blobs / "loading").exists)
        assert await ready() == 200
        loading.cancel()
        await asyncio.wait((loading,))
        await host.swapper.go_live(await host.swapper.load(fake_spec(host.blobs, "2", model="other")))
        assert await ready() == 200
        await host.swapper.retire(slots.find("other", None))
        assert await ready() == 400
        slots.assign(frozenset({"scale"}), certain=True)
        assert await ready() == 200

    run(body, tmp_path, FAKE, FAKE_PROGRAM)
