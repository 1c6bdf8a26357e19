"""The demo's patience: it waits for a slow machine, gives up on one that stands still, and says what it waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import pytest

from weighbridge import terminal
from weighbridge.cli.exits import Failed
from weighbridge.demo import patience, run
from weighbridge.demo.entries import Entry, fill
from weighbridge.demo.patience import Patience, Stuck
from weighbridge.registry.schemas import Job, Variant, VariantBenchmark, VersionDetail

NOW = datetime.now(UTC)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_waits_for_as_long_as_something_moves() -> None:
    """Not longer than in all, and not for what stands still."""
    clock = Clock()
    wait = Patience("measuring", still=10, longest=100, clock=clock)
    for clock.now in range(0, 90, 9):
        wait.look(clock.now)
    clock.now = 95
    with pytest.raises(Stuck, match=r"measuring: nothing has moved for 10 s") as stuck:
        wait.look(81, ("a job",))
    assert stuck.value.details == ("a job",)
    clock.now = 101
    with pytest.raises(Stuck, match="measuring took longer than 100 s"):
        wait.look("moved")


def test_it_names_the_work_that_did_not_end() -> None:
    """Whose it is, how far, which attempt, and why it was tried again."""
    base = {"id": 1, "key": "", "queue": "variants", "max_attempts": 8, "created_at": NOW}
    ended = Job(**base, stage="compress", state="done", attempt=1, progress=1, finished_at=NOW)
    going = Job(**base, stage="benchmark", state="running", attempt=2, progress=0.4, reason="busy")
    waits = Job(**base, stage="evaluate", state="queued", attempt=0, progress=0)
    version = VersionDetail(
        model="digits", number=3, status="ready", jobs=[waits], created_at=NOW, revision=1,
        variants=[Variant(name="onnx", status="ready", jobs=[ended, going])],
    )  # fmt: skip
    assert [patience.told(*one) for one in patience.unfinished(version)] == [
        "digits onnx: benchmark is running, attempt 2 of 8, 40% done: busy",
        "digits 3: evaluate is queued, attempt 0 of 8",
    ]


def test_it_shows_the_end_of_every_log(tmp_path: Path) -> None:
    """What the children wrote, not only the supervisor, which has nothing to say."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "up.log").touch()
    (tmp_path / "logs" / "worker.log").write_text("".join(f"line {number}\n" for number in range(50)))
    lines = list(patience.log_ends(tmp_path))
    assert lines[0] == f"{tmp_path / 'logs' / 'worker.log'} ends:"
    assert lines[-1] == "  line 49"
    assert len(lines) < 20


def test_what_it_waited_for_is_shown_before_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The jobs that did not end, and the logs, a line each on stderr; then one line says that it failed."""

    @contextmanager
    def up(bucket: object, data: Path, *, seconds: float) -> Iterator[dict[str, str]]:
        (data / "logs").mkdir(parents=True)
        (data / "logs" / "worker.log").write_text("the worker has died\n")
        yield {"registry": "http://127.0.0.1:9", "data": str(data)}

    def stuck(*_: object, **__: object) -> None:
        raise Stuck("nothing has moved", ("digits onnx: benchmark is running",))

    monkeypatch.setattr(run.stage, "up", up)
    monkeypatch.setattr(run, "_training_ddp", lambda folder: nullcontext())
    monkeypatch.setattr(run, "_first_act", stuck)
    with pytest.raises(Failed, match=r"^nothing has moved \(the lines above"):
        run.run(terminal.console(), folder=tmp_path / "demo")
    log = tmp_path / "demo" / "data" / "logs" / "worker.log"
    err = capsys.readouterr().err
    assert err == f"digits onnx: benchmark is running\n{log} ends:\n  the worker has died\n"


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"finding": "faster", "speedup": 3.5, "p50": 0.001}, "3.50 ×, p50 1.000 ms"),
        ({"finding": "same", "speedup": 1.0, "p50": 0.001}, "as fast, p50 1.000 ms"),
    ],
)
def test_a_variant_is_told_by_its_ratio(measured: dict[str, object], said: str) -> None:
    """First what counts on any machine, then what this one took."""
    entry = Entry("digits", "onnx", "ready")
    seen = VariantBenchmark.model_validate(
        {"variant": "onnx", "artifact_digest": "a", "kind": "k", "status": "valid", **measured}
    )
    assert fill(entry, Variant(name="onnx", status="ready", reason="keeps all", size=5), seen, original=10)
    assert entry.line() == f"digits onnx: ready: keeps all; {said}"
    assert (entry.share, entry.right) == (0.5, True)


def test_beside_other_work_the_interval_is_said_and_the_time_marked() -> None:
    """`measured beside other work`: nobody should compare its milliseconds."""
    entry = Entry("digits", "onnx", "ready", "ready", p50=0.001, speedup=3.5, finding="faster", interval=(3.1, 4.0))
    entry.contended = "other processes took 60% of the processors"
    assert entry.times == "3.50 × (3.10–4.00)"
    assert entry.line() == (
        "digits onnx: ready: 3.50 × (3.10–4.00), p50 1.000 ms "
        "beside other work (other processes took 60% of the processors)"
    )
