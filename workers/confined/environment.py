"""What a process that touches strangers' bytes sees of our environment: no token, no storage key, no database."""

from __future__ import annotations

import os
from collections.abc import Mapping

_INHERITED = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CXX",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip


def scrubbed(threads: int) -> Mapping[str, str]:
    """The environment of such a process, which computes with so many threads."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return kept | {"OMP_NUM_THREADS": str(threads)}
