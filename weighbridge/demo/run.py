"""The story in two acts: drops are weighed and rolled out; then variants of two models compete for the hosts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from weighbridge import escapes, terminal
from weighbridge.cli.exits import Exit, Failed
from weighbridge.cli.template import parse_input, register_template
from weighbridge.demo import ask, board, digits, drops, patience, stage
from weighbridge.demo.board import Board, Row
from weighbridge.demo.contest import Contest, Served
from weighbridge.demo.entries import Entry, table
from weighbridge.demo.stage import Bucket
from weighbridge.registry.client import Client
from weighbridge.registry.errors import RegistryError

PATIENCE = 180.0
"""Seconds for any one thing of the first act to happen; on a quiet machine all of it takes twenty."""
_WIDE = 120
"""Columns of a terminal that shows long texts too."""
BALLAST = (96, 384, 768)
"""MB of the checkpoint that is overwritten; a larger one where validation was faster than we were."""


STILL, MEASURING = 150.0, 1200.0
"""Seconds of the second act in which nothing moves, and for all of it. It needs two minutes of processor time; on two
processors with a load of 18 it took seven by the clock."""


@dataclass(frozen=True)
class Result:
    """What the first act showed."""

    ok: bool
    rows: list[Row]
    accuracy: float
    hosts: list[dict[str, Any]]
    sentinel: bool

    def as_json(self) -> dict[str, Any]:
        verdicts = [row.verdict() for row in self.rows]
        return {"ok": self.ok, "verdicts": verdicts, "accuracy": self.accuracy, "hosts": self.hosts}


@dataclass(frozen=True)
class Measured:
    """What the second act showed. `wrong` says what is not as it has to be."""

    entries: list[Entry]
    served: list[Served]
    wrong: list[str]

    @property
    def ok(self) -> bool:
        return not self.wrong

    def as_json(self) -> dict[str, Any]:
        variants = [asdict(entry) | {"right": entry.right} for entry in self.entries]
        return {"ok": self.ok, "variants": variants, "served": [asdict(one) for one in self.served]}


def run(
    console: Console, *, folder: Path | None = None, s3: bool = False, live: bool = False, variants: bool = True
) -> tuple[Result, Measured | None]:
    """Show it all in `folder` (or a temporary one); without `variants` the first act alone.

    Raises Failed, RegistryError.
    """
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise Failed(f"{folder} is not empty: the demo wants a new folder, or none at all", Exit.REFUSED)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weighbridge-demo-")))
        place = (folder or scratch).absolute()
        sharded = stack.enter_context(_training_ddp(scratch / "sharded"))
        bucket = stack.enter_context(stage.s3_bucket(place / "s3") if s3 else stage.folder_bucket(place / "drops"))
        console.print(f"starting `weighbridge up` on {escapes.line(bucket.url)}; training on digits", markup=False)
        where = stack.enter_context(stage.up(bucket, place / "data", seconds=10 * PATIENCE))
        client = stack.enter_context(Client(where["registry"], data=where["data"]))
        console.print(escapes.line(f"registry {where['registry']}, data {where['data']}"), markup=False)
        try:
            first = _first_act(Show(client, bucket, scratch, console), sharded, live=live)
            second = _second_act(Contest(client, bucket, scratch), console, live=live) if variants else None
        except (TimeoutError, RegistryError, httpx.HTTPError) as exc:
            for line in (*getattr(exc, "details", ()), *patience.log_ends(place / "data")):
                terminal.line(line, stderr=True)
            raise Failed(f"{exc} (the lines above say what it waited for)") from exc
        return first, second


def _first_act(show: Show, sharded: subprocess.Popen[bytes], *, live: bool) -> Result:
    rows = show.board.rows
    picture = lambda: board.table(list(rows.values()), wide=show.console.width >= _WIDE)  # noqa: E731
    with board.shown(picture, show.console, live=live) as tell:
        show.board.tell = lambda row: tell(board.line(row))
        show.prepare()
        show.drop_all(sharded)
        return show.ask()


def _second_act(contest: Contest, console: Console, *, live: bool) -> Measured:
    console.print("\nvariants: each is built, judged beside its original, and measured on this machine", markup=False)
    with board.shown(lambda: table(contest.entries.values(), wide=console.width >= _WIDE), console, live=live) as tell:
        contest.tell = tell
        contest.drop()
        contest.until_settled(still=STILL, longest=MEASURING)
        served = contest.ask()
    wrong = contest.wrong() + [f"what serves: {one.line()}" for one in served if not one.right]
    return Measured(list(contest.entries.values()), served, wrong)


class Show:
    """One performance."""

    def __init__(self, client: Client, bucket: Bucket, scratch: Path, console: Console) -> None:
        self.client, self.bucket, self.console = client, bucket, console
        self.board = Board(client, lambda row: None)
        self.sentinel = scratch / "this-would-be-code-that-ran"
        self._scratch = scratch

    def prepare(self) -> None:
        """Register the program once, from our own code; put the recipe and the evaluation set beside the drops."""
        inputs = [parse_input(f"{digits.INPUT}=FP32[-1,64]")]
        register_template(self.client, digits.TEMPLATE, digits.FACTORY, inputs, (digits.OUTPUT,))
        evaluation = self._scratch / "eval.safetensors"
        digits.write_evaluation_set(evaluation)
        self.bucket.write(f"{drops.MODEL}/eval.safetensors", evaluation.read_bytes())
        self.bucket.write(f"{drops.MODEL}/recipe.yaml", drops.RECIPE.encode())

    def drop_all(self, sharded: subprocess.Popen[bytes]) -> None:
        """Drop the first and see it served; then all the others while it serves."""
        contents = drops.trained()
        self._write(drops.GOOD, contents[drops.GOOD])
        self._until(lambda: self.board.rows[drops.GOOD].ended and self._settled(), "serving the first checkpoint")
        for drop in (drops.BETTER, drops.WORSE, drops.NAN):
            self._write(drop, contents[drop])
        whole = contents[drops.TRUNCATED]
        self._write(drops.TRUNCATED, whole[: len(whole) // 2])
        self._write(drops.PICKLE, drops.hostile(self.sentinel))
        self._until(lambda: sharded.poll() is not None, "training with DistributedDataParallel")
        if sharded.returncode != 0:
            raise Failed("training with DistributedDataParallel failed: see the lines above")
        drops.write_folder(self.bucket.write, self._scratch / "sharded", drops.SHARDED.path)
        self.board.dropped(drops.SHARDED)
        self._until(lambda: bool(self.board.rows[drops.TRUNCATED].waited), "seeing that one checkpoint is cut off")
        self._write(drops.TRUNCATED, whole)
        self._overwrite(contents[drops.AGAIN])
        self._until(lambda: all(row.ended for row in self.board.rows.values()), "judging every checkpoint")

    def ask(self) -> Result:
        """When the fleet has settled on the newest good version, ask every host for the held-out digits."""
        self._until(self._settled, "rolling out the newest version")
        answers: list[dict[str, Any]] = []
        with httpx.Client(timeout=60) as http:
            for host in sorted(self.client.hosts(), key=lambda host: host.name):
                seen = round(ask.accuracy(http, host.url, drops.MODEL), 4)
                live = [slot.version for a in host.assignments for slot in a.slots if slot.role == "live"]
                answers.append(
                    {"name": host.name, "url": host.url, "version": next(iter(live), None), "accuracy": seen}
                )
        rows = list(self.board.rows.values())
        worst = min((answer["accuracy"] for answer in answers), default=0.0)
        right = all(row.right for row in rows) and not self.sentinel.exists()
        return Result(right and len(answers) == 2 and worst > 0.9, rows, worst, answers, self.sentinel.exists())

    def _write(self, drop: drops.Drop, data: bytes) -> None:
        self.bucket.write(drop.path, data)
        self.board.dropped(drop)

    def _overwrite(self, again: bytes) -> None:
        """Write a heavy checkpoint and, as soon as it is a version, write another over it.

        A validation that was faster judged whole, unmixed bytes, which is right too, but shows nothing: once more.
        """
        for megabytes in BALLAST:
            known = self._newest()
            self._write(drops.OVERWRITTEN, drops.heavy(megabytes))
            self._until(lambda known=known: self._newest() > known, "finding the heavy checkpoint", pause=0.02)
            self.board.heavy = self._newest()  # before the next is there: it may be found at once
            self.bucket.write(drops.AGAIN.path, again)
            self.board.dropped(drops.AGAIN)
            ended = [self.board.rows[drop] for drop in (drops.OVERWRITTEN, drops.AGAIN)]
            self._until(lambda ended=ended: all(row.ended for row in ended), "judging the overwritten checkpoint")
            if self.board.rows[drops.OVERWRITTEN].status == drops.OVERWRITTEN.expected:
                return

    def _newest(self) -> int:
        """The number of the newest version at the path that is overwritten, 0 before the first."""
        found = self.client.versions(drops.MODEL)
        return next((version.number for version in found if version.path == drops.OVERWRITTEN.path), 0)

    def _settled(self) -> bool:
        """No rollout goes on, and the champion is the newest ready version."""
        if any(True for _ in self.client.rollouts(drops.MODEL, going=True)):
            return False
        newest = next(iter(self.client.versions(drops.MODEL, "ready")), None)
        return newest is not None and "champion" in newest.aliases

    def _until(self, done: Any, what: str, *, pause: float = 0.2) -> None:
        self.board.until(done, what, seconds=PATIENCE, pause=pause)


@contextmanager
def _training_ddp(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Train on two ranks in the background: it takes longer than everything else."""
    command = [sys.executable, "-m", "weighbridge.demo.ddp", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
