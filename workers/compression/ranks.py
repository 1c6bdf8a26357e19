"""How a process of a distributed training ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """End this rank, with success and at once, without the interpreter's own end. Call it when all is written.

    A thread of gloo or of autograd that wants the interpreter's lock while the interpreter ends is unwound through
    C++ that must not throw: "terminate called without an active exception", and a training that was done has failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
