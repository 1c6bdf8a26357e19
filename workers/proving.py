"""What a golden proves: nothing, where other weights of the same program pass it too. No Celery, no SQL."""

from __future__ import annotations

from collections.abc import Mapping

from weighbridge.engines import golden
from weighbridge.engines.errors import EngineError, GoldenMismatch
from weighbridge.engines.other_weights import replace_weights
from weighbridge.engines.protocols import Session
from weighbridge.engines.spread import Tolerance
from weighbridge.engines.torch_engine import TorchSession
from weighbridge.workers.ours import raise_ours

NOTHING = "proves nothing: other weights pass it too"
_FEW = 64
"""Expected elements below which chance may decide: one class of two is right every second time."""
_TURNS = 3


def worthless(session: Session, goldens: Mapping[str, bytes], tolerance: Tolerance) -> dict[str, str]:
    """Which of the goldens (by name) other weights pass as well, and that in words. Spends the session's weights.

    Where not all weights could be changed, a golden that still passes is named as not tried in full.
    """
    if not isinstance(session, TorchSession):
        return {}
    found: dict[str, str] = {}
    for turn in range(max((_turns(data) for data in goldens.values()), default=0)):
        changed, of = replace_weights(session.module, turn)
        for name, data in goldens.items():
            if name not in found and turn < _turns(data) and _passes(session, data, tolerance):
                found[name] = NOTHING if changed == of else f"was tried with {changed} of {of} weights changed only"
    return found


def _turns(data: bytes) -> int:
    return _TURNS if sum(one.size for one in golden.read(data)[1].values()) < _FEW else 1


def _passes(session: Session, data: bytes, tolerance: Tolerance) -> bool:
    """A program that fails with other weights is one that a golden tells apart."""
    try:
        golden.check(session, data, *tolerance)
    except (GoldenMismatch, EngineError) as exc:
        raise_ours(exc)
        return False
    return True
