"""Old weights under a running fleet: whatever is done around them, nothing moves."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.digits import Digits
from fixtures.running import MODEL, START_SECONDS, StartUp, Up
from fixtures.worker import until
from safetensors.numpy import save_file

from weighbridge.registry.schemas import Checkpoint

pytestmark = pytest.mark.slow


def _away_and_back(folder: Path) -> None:
    folder.rename(folder.parent.parent / "away")
    (folder.parent.parent / "away").rename(folder)


def _copied_over(folder: Path) -> None:
    """As `cp` or `rsync -a` over it: the same bytes in another file."""
    aside = folder.parent.parent / "aside"
    shutil.copy2(folder / "model.safetensors", aside)
    aside.replace(folder / "model.safetensors")


def _twice(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights)


WAYS: dict[str, Callable[[Path], object]] = {
    "a README": lambda folder: (folder / "README.md").write_text("notes"),
    "Thumbs.db": lambda folder: (folder / "Thumbs.db").write_bytes(b"x"),
    "no config any more": lambda folder: (folder / "config.json").unlink(),
    "chmod": lambda folder: (folder / "model.safetensors").chmod(0o664),
    "touch": lambda folder: os.utime(folder / "model.safetensors"),
    "an old date": lambda folder: os.utime(folder / "model.safetensors", (10**9, 10**9)),
    "a hard link": lambda folder: os.link(folder / "model.safetensors", folder.parent.parent / "backup"),
    "renamed away and back": _away_and_back,
    "copied over itself": _copied_over,
    "written again": _twice,
}


def test_old_weights_that_are_touched_move_nothing(start_up: StartUp, digits: Digits, digits_linear: Any) -> None:
    """Every way of touching an old, an archived and the served checkpoint, a copy of an old one, and a restart between:
    no version but the copy's duplicate, no rollout, the same answers; and a new checkpoint is rolled out as ever."""
    up = start_up({"daemon.list_seconds": 0.5})
    up.register(digits_linear)
    up.wish(digits)
    rows = {"monday": 500, "tuesday": 900, "wednesday": 1397}
    for number, (name, count) in enumerate(rows.items(), 1):
        drop(up, name, digits.train(rows=count))
        until("it is served", lambda number=number: up.serving() == [str(number)] * 2, START_SECONDS)
    up.client.archive(MODEL, 2, "bad in production")
    rollouts = len(list(up.client.rollouts(MODEL)))
    for folder in (up.drops / MODEL / name for name in rows):
        for way, do in WAYS.items():
            before = seen(up, folder)
            do(folder)
            until(
                f"{way} is seen", lambda folder=folder, old=(before, None): seen(up, folder) not in old, START_SECONDS
            )
            (folder.parent.parent / "backup").unlink(missing_ok=True)
    shutil.copytree(up.drops / MODEL / "monday", up.drops / MODEL / "copy")
    subprocess.run(["cp", "-al", up.drops / MODEL / "tuesday", up.drops / MODEL / "link"], check=True)
    for path, number in (("copy", 1), ("link", 2)):
        found = up.client.wait(MODEL, path=f"{MODEL}/{path}/", until=("duplicate",), timeout=START_SECONDS)
        assert found.duplicate_of == number
    up.kill("daemon")
    assert up.serving() == ["3", "3"]
    assert up.client.version(MODEL).number == 3
    assert len(list(up.client.rollouts(MODEL))) == rollouts
    drop(up, "thursday", digits.train(rows=1300))
    until("the new one is served", lambda: up.serving() == ["6", "6"], START_SECONDS)
    found = {version.number: version.status for version in up.client.versions(MODEL)}
    assert found == {1: "ready", 2: "archived", 3: "ready", 4: "duplicate", 5: "duplicate", 6: "ready"}


def drop(up: Up, name: str, tensors: dict[str, Any]) -> None:
    """As a trainer writes a checkpoint: a folder with its weights, then what accompanies them."""
    folder = up.drops / MODEL / name
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def seen(up: Up, folder: Path) -> Checkpoint | None:
    """The checkpoint's row as it stands when nothing waits; None while something is looked at."""
    rows = {row.path: row for row in up.client.checkpoints(MODEL, "complete")}
    return rows.get(f"{MODEL}/{folder.name}/")
