"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: whether it is well, in words, and what to do otherwise.

    `warns`: it works, and should not stay so. `permission` is the IAM action that is missing, `roles` say who needs it.
    """

    part: str
    ok: bool
    what: str
    fix: str = ""
    permission: str | None = None
    roles: tuple[str, ...] = ()
    warns: bool = False

    @property
    def state(self) -> str:
        return "failed" if not self.ok else "warning" if self.warns else "ok"
