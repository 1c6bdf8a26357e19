"""What is seen of the drops: a row each, kept up to date from the registry, drawn live or as lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from weighbridge import escapes, terminal
from weighbridge.cli.output import cell
from weighbridge.demo import drops
from weighbridge.demo.drops import Drop
from weighbridge.demo.patience import Stuck, told, unfinished
from weighbridge.registry.client import Client
from weighbridge.registry.client_feed import ENDED
from weighbridge.registry.schemas import Version


@dataclass
class Row:
    """A drop as it stands. `seconds` run from its (last) write to its verdict; `waited` is why it had to, at first."""

    drop: Drop
    status: str = ""
    reason: str = ""
    number: int | None = None
    since: float | None = None
    seconds: float | None = None
    waited: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def right(self) -> bool:
        """The verdict is the right one, and what had to wait did."""
        return self.status == self.drop.expected and (self.drop is not drops.TRUNCATED or bool(self.waited))

    def verdict(self) -> dict[str, object]:
        seconds = None if self.seconds is None else round(self.seconds, 2)
        waited = f"waited: {self.waited}; then: " if self.waited else ""
        return {
            "checkpoint": self.drop.name,
            "expected": self.drop.expected,
            "status": self.status or "not seen",
            "reason": waited + self.reason,
            "seconds": seconds,
        }


@dataclass
class Board:
    """All rows. `tell` is called with each row that changed its status."""

    client: Client
    tell: Callable[[Row], None]
    heavy: int = 0
    """The number of the version that was overwritten, once there is one: it shares its path with the next."""
    rows: dict[Drop, Row] = field(default_factory=lambda: {drop: Row(drop) for drop in drops.ALL})

    def dropped(self, drop: Drop) -> None:
        """It is written now: the clock of its row starts."""
        row = self.rows[drop]
        row.since, row.seconds, row.number, row.reason, row.status = time.monotonic(), None, None, "", "dropped"
        self.tell(row)

    def look(self) -> None:
        """Ask the registry once."""
        versions: dict[str, list[Version]] = {}
        for version in self.client.versions(drops.MODEL):
            versions.setdefault(version.path, []).insert(0, version)
        for drop, row in self.rows.items():
            if row.since is not None and (found := self._pick(drop, versions.get(drop.path, []))) is not None:
                self._update(row, found.status, found.reason, found.number)
        for waiting in self.client.checkpoints(drops.MODEL, "waiting"):
            for drop, row in self.rows.items():
                if drop.path == waiting.path and row.since is not None and row.number is None:
                    row.waited = row.waited or (waiting.reason if drop is drops.TRUNCATED else "")
                    self._update(row, "waiting", waiting.reason, None)

    def until(self, done: Callable[[], bool], what: str, *, seconds: float, pause: float = 0.2) -> None:
        """Look until `done`. Raises Stuck, saying what it waited for."""
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            if done():
                return
            if time.monotonic() > deadline:
                raise Stuck(f"{what} took longer than {seconds:g} s", self._unfinished())
            time.sleep(pause)

    def _unfinished(self) -> tuple[str, ...]:
        """The drops that have not ended, and the work that goes on."""
        rows = [line(row) for row in self.rows.values() if row.since is not None and not row.ended]
        numbers = [row.number for row in self.rows.values() if row.number is not None]
        versions = [self.client.version(drops.MODEL, number) for number in numbers]
        return (*rows, *(told(whose, job) for version in versions for whose, job in unfinished(version)))

    def _pick(self, drop: Drop, versions: list[Version]) -> Version | None:
        """The version of a drop among those of its path, oldest first."""
        if drop is drops.OVERWRITTEN:
            versions = [version for version in versions if version.number == self.heavy]
        if drop is drops.AGAIN:
            versions = [version for version in versions if version.number > self.heavy]
        return versions[-1] if versions else None

    def _update(self, row: Row, status: str, reason: str, number: int | None) -> None:
        changed = (row.status, row.number) != (status, number)
        row.status, row.reason, row.number = status, reason, number
        if row.ended and row.seconds is None and row.since is not None:
            row.seconds = time.monotonic() - row.since
        if changed:
            self.tell(row)


@contextmanager
def shown(picture: Callable[[], Table], console: Console, *, live: bool) -> Iterator[Callable[[str], None]]:
    """Draw as it changes: one live table, or where no person looks a line for each change that is told."""
    if not live:
        yield lambda line: console.print(escapes.line(line), markup=False, soft_wrap=True)
        return
    with Live(console=console, refresh_per_second=4, get_renderable=picture):
        yield lambda line: None


def table(rows: list[Row], *, wide: bool = True) -> Table:
    """The whole picture; `wide` says also what each drop is."""
    columns = ["", "checkpoint", *(["what it is"] if wide else []), "expected", "status", "seconds", "reason"]
    return terminal.grid(columns, [list(map(cell, _cells(row, wide=wide))) for row in rows])


def _cells(row: Row, *, wide: bool) -> Iterator[str]:
    yield "" if not row.ended else "✓" if row.right else "✗"
    yield row.drop.name
    if wide:
        yield row.drop.what
    yield from (row.drop.expected, row.status)
    yield "" if row.seconds is None else f"{row.seconds:.1f}"
    yield f"waited: {row.waited}; {row.reason}" if row.waited and row.ended else row.reason


def line(row: Row) -> str:
    """A row in one line, for logs."""
    number = f" as version {row.number}" if row.number is not None else ""
    seconds = f" after {row.seconds:.1f} s" if row.ended and row.seconds is not None else ""
    return f"{row.drop.name}: {row.status}{number}{seconds}" + (f": {row.reason}" if row.reason else "")
