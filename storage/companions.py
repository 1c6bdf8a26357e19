"""Which files of a checkpoint's folder are read and which are left out, by name alone: the one place that says so.

What nobody reads (a trainer's log, a vocabulary, an optimizer's state, code) is neither kept nor looked into, so it
cannot harm either: it is named, and that is all. A format that reads more adds its names to `is_read`, and looks into
what it reads where it reads it (a `config.json` that becomes a program: for `auto_map` and the like).
"""

from __future__ import annotations

from collections.abc import Mapping

from weighbridge.storage import names
from weighbridge.storage.protocols import Ref
from weighbridge.words import counted

CODE = frozenset(
    {".py", ".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".ps1", ".ipynb", ".js"}
)
"""Suffixes of what would run if somebody let it."""
_NAMED = 5
"""Files that a note names."""


def is_read(path: str) -> bool:
    """Whether validation reads a file: weights, their index, and, at the top, our manifest and the author's golden."""
    return names.is_weights(path) or path.endswith(names.INDEX) or path in (names.PUBLISHED, names.GOLDEN)


def is_code(path: str) -> bool:
    """Whether a name says that the file is code."""
    return names.suffix(path.rpartition("/")[2]) in CODE or "__pycache__" in path.split("/")


def note(left_out: Mapping[str, Ref]) -> str:
    """What a person should know of the files left out, by their paths; code comes first. Empty where there are none."""
    if not left_out:
        return ""
    order = sorted(left_out, key=lambda path: (not is_code(path), path))
    listed = ", ".join(f"{path} (code, never stored nor run)" if is_code(path) else path for path in order[:_NAMED])
    more = f" and {len(order) - _NAMED} more" if len(order) > _NAMED else ""
    size = sum(ref.size for ref in left_out.values())
    count = f"{counted(len(order), 'file')} of {size:,} bytes"
    return f"left out of the artifact, since nothing here uses them: {count}: {listed}{more}"
