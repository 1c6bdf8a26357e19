"""Open a template in a process of its own, which never imported the code that it was made of: so will workers.

`python -m weighbridge.engines.reopen FILE DIGEST` ends with 0, or with 1 and the reason on its
output; what torch logs is beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from weighbridge.engines.errors import LoadError
from weighbridge.engines.program import open_template


def main(argv: Sequence[str]) -> int:
    path, digest = argv
    try:
        open_template(Path(path), digest)
    except LoadError as exc:
        print(exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
