"""The report of a real registry, and in a real browser where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from fixtures.api import Api, put_ready, sqlite_only
from fixtures.report import subject

from weighbridge.report import page
from weighbridge.report.subject import collect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@sqlite_only
def test_a_version_that_is_served_as_it_is_has_a_report(api: Api) -> None:
    """No variants, no measurements: what the API answers is enough."""
    version = put_ready(api)
    html = page.render(collect(api.client(), "digits", version.number))
    assert f"digits {version.number}" in html
    assert "No speed was measured" in html


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to look at the page with")
def test_a_browser_opens_it_from_disk_without_a_complaint(tmp_path: Path) -> None:
    """Every picture is parsed whole, and the page's own policy blocks nothing of the page."""
    assert CHROMIUM is not None
    written = tmp_path / "report.html"
    written.write_text(page.render(subject()), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000")
    seen = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", written.as_uri()],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert seen.stdout.count("</svg>") == 9
    assert "Model card" in seen.stdout
    assert "CONSOLE" not in seen.stderr  # refusals by the policy are told there
