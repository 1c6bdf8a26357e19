"""What a good checkpoint costs in a bucket full of junk: a million objects, and what was made to stop the daemon.

    python benchmarks/junk.py [--objects 1000000] [--drops 5] [--folder /dev/shm]

Real files in a watched folder, the real `weighbridge up` (daemon, worker, registry, no hosts) as an ordinary user.
The junk lies there before the daemon starts: empty files in one model's folder, in thousands of models, in folders of a
hundred, and in the good model's own folder; one unreadable folder, one file of the year 30489, one folder in 1,100
others, ten hostile recipes, six index bombs of 64 MiB. Then good checkpoints are dropped: at the start, while the first
listing and its looks go on, and later. `recorded` is the time until the version is in the registry,
`ready` until the worker has validated it; `bare` rows are the same in an empty folder on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from weighbridge.registry.client import Client

OWN = 0.05
"""Share of the junk that lies in the good model's own folder."""
ORDINARY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")
"""Root reads everything; without these rights it reads what its files' modes allow."""
FACTORY = """
import torch
def build():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
"""
RECIPES = (
    b"gates: [" + b"{metric: x}," * 5000 + b"]", b"[" * 60_000, b"a: " + b"9" * 60_000, b"!!bool maybe", b"? " * 30_000,
    b"a: 2026-13-45", b"x" * 300_000, b"&a [*a]", b"\xff", b"".join(b"a%d: 1\n" % n for n in range(6000)),
)  # fmt: skip


def good(seed: int) -> bytes:
    """A checkpoint that the template's program takes."""
    random = np.random.default_rng(seed)
    shapes = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (3, 8), "2.bias": (3,)}
    return save({name: random.normal(size=shape).astype("float32") for name, shape in shapes.items()})


def bombs() -> Iterator[bytes]:
    """Six indexes of 64 MiB: of tensors, of lists, of texts in each field that a reader could keep."""
    size = (64 << 20) - 200
    yield b'{"weight_map": {' + b",".join(b'"t%07d": "a.safetensors"' % n for n in range(size // 28)) + b"}}"
    yield b'{"weight_map": {"a": [' + b"[]," * (size // 3) + b"[]]}}"
    yield b'{"metadata": {"x": [' + b"{}," * (size // 3) + b"{}]}}"
    yield b'{"weight_map": {"' + b"x" * size + b'": "a.safetensors"}}'
    yield b'{"weight_map": ' + b" " * size + b"{}}"
    yield "".join(('{"weight_map": {"', "\U0001f600" * (size // 4), '": 1}}')).encode()


def litter(drops: Path, count: int) -> None:
    """The junk, in the shapes that queues and memory could break on."""
    own, models, folders = int(count * OWN), count // 4, count // 10
    places: list[Callable[[int], str]] = [
        *[lambda n: f"junk/{n:07}.safetensors"] * (count - own - models - folders),
        *[lambda n: f"model{n % 2500:04}/{n:07}.safetensors"] * models,
        *[lambda n: f"folders/run{n // 100:05}/{n:07}.json"] * folders,
        *[lambda n: f"digits/junk{n:07}.safetensors"] * own,
    ]
    made = set[str]()
    for number, place in enumerate(places):
        path = drops / place(number)
        if (folder := os.path.dirname(path)) not in made:
            os.makedirs(folder, exist_ok=True)
            made.add(folder)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def traps(drops: Path) -> dict[str, str]:
    """What was made to stop the daemon, by the path that its row must have."""
    (drops / "lost+found").mkdir()
    (drops / "lost+found").chmod(0)
    odd = drops / "odd/year.safetensors"
    odd.parent.mkdir()
    odd.write_bytes(good(1))
    os.utime(odd, (9e11, 9e11))
    (drops / "deep").mkdir()
    here = os.open(drops / "deep", os.O_RDONLY)
    for name in ("run", *["d"] * 1100):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    found = {"lost+found/": "an unreadable folder", "deep/run/": "1,100 folders within each other"}
    for number, text in enumerate(RECIPES):
        (drops / f"recipe{number}").mkdir()
        (drops / f"recipe{number}/recipe.yaml").write_bytes(text)
        (drops / f"recipe{number}/a.safetensors").write_bytes(good(2))
        found[f"recipe{number}/a.safetensors"] = "a hostile recipe"
    for number, text in enumerate(bombs()):
        (drops / f"bomb/run{number}").mkdir(parents=True)
        (drops / f"bomb/run{number}/model.safetensors.index.json").write_bytes(text)
        found[f"bomb/run{number}/"] = "an index bomb"
    return found


@contextlib.contextmanager
def running(folder: Path, drops: Path) -> Iterator[tuple[Client, int]]:
    """`weighbridge up` on the drops: a client, and the daemon's process id."""
    settings = {"data": folder / "data", "storage.url": drops, "registry.port": 0, "worker.machine": folder / "machine"}
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "weighbridge.cli", *options, "up", "--json", "--hosts", "0"]
    if os.geteuid() == 0:
        command = [*ORDINARY, *command]
    with (folder / "up.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=folder, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "up.log").read_text()
        with Client(json.loads(line)["registry"]) as client:
            yield client, child(process.pid, "daemon")
    finally:
        process.terminate()
        process.wait(60)


def child(parent: int, role: str) -> int:
    """The process id of a role that `up` started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            mother = int(stat.read_text().rpartition(")")[2].split()[1])
            if mother == parent and role in stat.with_name("cmdline").read_text().split("\0"):
                return int(stat.parent.name)
    raise RuntimeError(f"no {role} below {parent}")


def peak(process: int) -> int:
    """MiB of resident memory, at most, so far."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def drop(client: Client, drops: Path, name: str, seed: int, limit: float = 120.0) -> tuple[float, float]:
    """Seconds until a good checkpoint is recorded, and until it is ready."""
    path = drops / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(good(seed))
    start, model, recorded = time.perf_counter(), name.split("/")[0], 0.0
    while time.perf_counter() - start < limit:
        version = next((one for one in client.versions(model) if one.path == name), None)
        if version is not None:
            recorded = recorded or time.perf_counter() - start
            if version.status != "discovered":
                assert version.status == "ready", (version.status, version.reason)
                return recorded, time.perf_counter() - start
        time.sleep(0.02)
    raise TimeoutError(f"{name} is not ready after {limit:.0f} s (recorded: {recorded:.1f} s)")


def row(when: str, times: list[tuple[float, float]], memory: int) -> None:
    recorded, ready = ([time_[index] for time_ in times] for index in (0, 1))
    figures = (statistics.median(recorded), max(recorded), statistics.median(ready), max(ready))
    print(f"{when:44}" + "".join(f"{figure:10.2f}" for figure in figures) + f"{memory:12}", flush=True)


def add_template(client: Client, folder: Path) -> None:
    (folder / "factory.py").write_text(FACTORY)
    command = [sys.executable, "-m", "weighbridge.cli", "--registry", client.url, "template", "add", "mlp"]
    shape = ["factory:build", "--input", "x=FP32[-1,4]", "--output", "y"]
    subprocess.run([*command, *shape], cwd=folder, check=True, capture_output=True)


def measure(when: str, client: Client, daemon: int, drops: Path, count: int, seed: int) -> None:
    """Drops into the crowded model and into a new one, in turns."""
    names = [f"{('digits', f'fresh{seed}')[n % 2]}/{when.split()[0]}-{n}.safetensors" for n in range(count)]
    times = [drop(client, drops, name, seed + n) for n, name in enumerate(names)]
    row(when, times, peak(daemon))


def listed(client: Client, expected: dict[str, str], limit: float) -> dict[str, str]:
    """Wait until each trap has a row, or is a version in quarantine; what is said of each."""
    end = time.monotonic() + limit
    found: dict[str, str] = {}
    while time.monotonic() < end and len(found) < len(expected):
        for path in expected.keys() - found.keys():
            model = path.split("/")[0]
            rows = [(one.path, one.state, one.reason) for one in client.checkpoint_page(model, limit=1000).items]
            rows += [(one.path, one.status, one.reason) for one in client.versions(model)]
            if said := next((f"{state}: {reason[:110]}" for where, state, reason in rows if where == path), ""):
                found[path] = said
        time.sleep(0.5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--drops", type=int, default=6)
    parser.add_argument("--patience", type=float, default=300.0, help="longest wait for the traps' rows (s)")
    parser.add_argument("--seconds", type=float, default=180.0, help="when the last drops come, after the start (s)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="a file system that keeps odd dates")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="wb-junk-", dir=options.folder))
    folder.chmod(0o755)
    try:
        run(folder, options)
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)  # shutil.rmtree is recursive


def run(folder: Path, options: argparse.Namespace) -> None:
    print(f"{'s; real files, one machine':44}{'recorded':>10}{'worst':>10}{'ready':>10}{'worst':>10}{'daemon MiB':>12}")
    empty = folder / "empty"
    (empty / "drops").mkdir(parents=True)
    with running(empty, empty / "drops") as (client, daemon):
        add_template(client, empty)
        row(
            "bare, the very first (the worker starts)",
            [drop(client, empty / "drops", "first/a.safetensors", 99)],
            peak(daemon),
        )
        measure("bare", client, daemon, empty / "drops", options.drops, 100)
    full = folder / "full"
    (full / "drops").mkdir(parents=True)
    start = time.monotonic()
    expected = traps(full / "drops")
    litter(full / "drops", options.objects)
    print(f"{options.objects:,} objects of junk and {len(expected) + 1} traps made in {time.monotonic() - start:.0f} s")
    with running(full, full / "drops") as (client, daemon):
        add_template(client, full)
        begun = time.monotonic()
        row(
            "the very first (the worker starts)",
            [drop(client, full / "drops", "first/a.safetensors", 99)],
            peak(daemon),
        )
        measure("beginning (the first listing goes on)", client, daemon, full / "drops", options.drops, 200)
        found = listed(client, expected, options.patience)
        time.sleep(max(0.0, options.seconds - (time.monotonic() - begun)))
        measure("later (junk is being looked at)", client, daemon, full / "drops", options.drops, 300)
        dated = [one.number for one in client.versions("odd")]
        start = time.perf_counter()
        waiting = client.status().open_checkpoints
        print(f"status answered in {time.perf_counter() - start:.2f} s, daemon {peak(daemon)} MiB at most")
        print(f"{waiting:,} rows wait or were refused; the year 30489 is version {dated} of odd")
        for path, what in expected.items():
            print(f"  {what}: {path}: {found.get(path, 'NO ROW')}")


if __name__ == "__main__":
    main()
