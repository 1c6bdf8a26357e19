"""What a host says of its device when it enrols."""

from __future__ import annotations

import pytest

from weighbridge.hosts.agent import device_facts


def test_a_device_that_is_not_there_keeps_no_host_away(caplog: pytest.LogCaptureFixture) -> None:
    """It enrols as of no known kind, and says why in its log."""
    assert device_facts("cuda:99") == {"kind": "", "device": "cuda:99"}
    assert "cannot describe device cuda:99" in caplog.text
