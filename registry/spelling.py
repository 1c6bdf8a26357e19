"""What somebody may have meant by a name that is not there. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 10_000
"""Names that are looked through."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is spelled most like it; empty where none is."""
    folded = {one.casefold(): one for one in known}
    found = difflib.get_close_matches(name.casefold(), folded, 1, 0.6)
    return folded[found[0]] if found else ""
