"""Sending jobs: bounded in time when the broker is away, in order when there is none."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import SecretStr

from weighbridge.registry.models import Job
from weighbridge.registry.settings import BrokerSettings
from weighbridge.workers.queue import InlineSender, make_sender


def job(job_id: int) -> Job:
    return Job(id=job_id, key=str(job_id), subject_type="version", subject_id=1, stage="validate", queue="cpu")


def test_a_broker_that_is_away_costs_a_moment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing hangs or raises, nothing counts as sent, and it is said once."""
    sender = make_sender(BrokerSettings(url=SecretStr(f"redis+socket://{tmp_path}/none?virtual_host=0")))
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert sender.publish([job(1), job(2)]) == []
        assert sender.publish([job(1)]) == [], "and at once, within the second after a failure"
    assert time.monotonic() - begun < 2
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "the broker is away, jobs wait in the database"
    ]
    sender.close()


def test_the_inline_sender_runs_jobs_in_order() -> None:
    """A job that sends jobs does not nest: they run after it."""
    ran: list[int] = []

    def run(job_id: int) -> None:
        ran.append(job_id)
        if job_id == 1:
            assert sender.publish([job(3)]) == [3]
            ran.append(-1)

    sender = InlineSender(run)
    assert sender.publish([job(1), job(2)]) == [1, 2]
    assert ran == [1, -1, 2, 3]


def test_what_the_daemon_imports_is_free_of_torch() -> None:
    """Sending, rollout steps and the control process cost no torch."""
    modules = ", ".join(f"weighbridge.workers.{name}" for name in ("queue", "rollout", "run", "celery_process"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
