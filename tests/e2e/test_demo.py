"""`weighbridge demo` as a stranger runs it: without a terminal, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

EXPECTED = {
    "good": "ready",
    "better": "ready",
    "ddp-sharded": "ready",
    "worse": "rejected",
    "nan": "rejected",
    "truncated": "ready",
    "overwritten": "superseded",
    "overwritten-again": "ready",
    "pickle": "quarantined",
}
"""Eight drops; the overwritten one has two contents."""


def demo(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run it to its end: exit code, last line, stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHBRIDGE_")}
    done = subprocess.run(
        [sys.executable, "-m", "weighbridge.cli", "demo", str(folder / "demo"), "--json", *arguments],
        env=clean, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1450, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def left_running(folder: Path) -> list[str]:
    """Processes whose command line or working folder names the demo's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        if str(folder) in command and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(command)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("where", ["folder", "s3"])
def test_every_verdict_is_right_and_nothing_is_left_running(where: str, tmp_path: Path) -> None:
    """Eight drops end as they must, both hosts answer well with the newest, and every process it started is gone.

    In a folder the second act follows: variants of two models, and hosts that serve what measured best.
    """
    code, result, log = demo(tmp_path, *(["--s3", "--quick"] if where == "s3" else []))

    verdicts = {row["checkpoint"]: row for row in result["verdicts"]}
    assert {name: row["status"] for name, row in verdicts.items()} == EXPECTED, log[-3000:]
    assert all(row["reason"] and row["seconds"] > 0 for row in verdicts.values())
    assert verdicts["truncated"]["reason"].startswith("waited: digits/truncated.safetensors has ")
    assert "pickle" in verdicts["pickle"]["reason"]
    assert [host["name"] for host in result["hosts"]] == ["host-1", "host-2"]
    assert len({host["version"] for host in result["hosts"]}) == 1
    assert result["accuracy"] > 0.9
    assert left_running(tmp_path) == []
    if where == "folder":
        the_best_variants_serve(result["second"])
    assert (code, result["ok"]) == (0, True), log[-3000:]


def the_best_variants_serve(second: dict[str, Any]) -> None:
    """Two models have at least four variants each, one is refused with its numbers, and both hosts serve the choice."""
    for model in ("digits", "digits-cnn"):
        found = {row["variant"]: row for row in second["variants"] if row["model"] == model}
        built = [row for name, row in found.items() if name != "original" and row["size"]]
        assert len(built) >= 4
        (refused,) = (row for row in built if row["status"] == "rejected")
        assert refused["kept"] < 0.98
        assert "needs 98%" in refused["reason"]
        serves = [one for one in second["served"] if one["model"] == model]
        assert [one["host"] for one in serves] == ["host-1", "host-2"]
        (variant,) = {one["variant"] for one in serves}
        assert found[variant]["status"] == "ready"
        assert variant == "original" or found[variant]["finding"] == "faster"
        assert variant != "original" or not [row for row in built if row["finding"] == "faster"]
        assert all(one["accuracy"] > 0.9 and one["reason"] for one in serves)


@pytest.mark.slow
def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    """The demo wants a folder of its own: it would judge by what lies there."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/mine").write_text("precious")
    done = subprocess.run(
        [sys.executable, "-m", "weighbridge.cli", "demo", str(tmp_path / "demo")],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "is not empty" in done.stderr
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["mine"]
