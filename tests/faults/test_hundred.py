"""One hundred checkpoints at once, in every way that files come: one hundred versions, none twice, none half-read."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from blake3 import blake3
from fixtures.checkpoints import safetensors
from fixtures.running import MODEL, START_SECONDS, StartUp
from fixtures.worker import until

pytestmark = pytest.mark.slow

COUNT = 100
_PARTS, _PAUSE = 8, 0.05


def contents() -> dict[str, bytes]:
    """A hundred checkpoints by name, from 30 bytes to 4 MB, no two alike."""
    chance = random.Random(7)
    sizes = [int(10 ** chance.uniform(1.5, 6.6)) for _ in range(COUNT)]
    return {
        f"{number:03}.safetensors": safetensors({"w": ("U8", [size], chance.randbytes(size))})
        for number, size in enumerate(sizes)
    }


def write_slowly(path: Path, data: bytes) -> None:
    """In parts, with pauses: most looks find it short."""
    step = -(-len(data) // _PARTS)
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), step):
            file.write(data[start : start + step])
            time.sleep(_PAUSE)


def write_preallocated(path: Path, data: bytes) -> None:
    """Its size and its header first: it looks whole long before it is."""
    with path.open("wb", buffering=0) as file:
        file.write(data[:-16])
        file.truncate(len(data))
        time.sleep(_PARTS * _PAUSE)
        file.seek(-16, 2)
        file.write(data[-16:])


def test_a_hundred_at_once(start_up: StartUp, tmp_path: Path) -> None:
    """Written at once, in parts, preallocated, moved in and put by rename: the digest of every version is that of the
    dropped bytes."""
    up = start_up(hosts=0)
    folder, beside = up.drops / MODEL, tmp_path / "beside"
    folder.mkdir()
    beside.mkdir()
    dropped = contents()
    ways = [Path.write_bytes, write_slowly, write_preallocated]
    writers = []
    for number, (name, data) in enumerate(dropped.items()):
        if number % 4 == 3:
            (beside / name).write_bytes(data)
            (beside / name).rename(folder / name)
        else:
            writers.append(threading.Thread(target=ways[number % 4], args=(folder / name, data)))
            writers[-1].start()
    for writer in writers:
        writer.join()

    until("each is judged", lambda: list(up.statuses().values()) == ["needs_binding"] * COUNT, 2 * START_SECONDS)
    found = [up.client.version(MODEL, number) for number in range(1, COUNT + 1)]
    recorded = {file.key: file.digest for version in found for file in version.files}
    assert recorded == {f"{MODEL}/{name}": blake3(data).hexdigest() for name, data in dropped.items()}
    assert {(job.stage, job.state, job.attempt) for version in found for job in version.jobs} == {
        ("validate", "done", 1)
    }
    assert list(up.client.checkpoints(state="waiting")) == []
