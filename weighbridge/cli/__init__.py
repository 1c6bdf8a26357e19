"""The command line: reads settings, calls a room's verb, prints the answer.

No logic of its own belongs here, and no import of torch, Celery or SQL outside a command that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (docs/operations.md lists them)."""
    from weighbridge.cli.app import run

    return run(sys.argv[1:] if arguments is None else arguments)
