"""Bearer tokens: 256 random bits, shown once, stored only as a hash; they expire, and are revoked at once."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import or_, select, update
from sqlmodel import col

from weighbridge.registry import db, events
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Forbidden, Invalid, NotFound, Unauthorized
from weighbridge.registry.models import Token

ROLES: Final = ("viewer", "publisher", "approver", "admin", "host", "enrol")
_PREFIX: Final = "wb_"
"""Lets secret scanners know one when they see one."""
_LEAST: Final = 32
"""Characters of a token that an operator chose."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `host_id` binds a host's or an enrolment token to one host; `token_id`: None on an open registry."""

    role: str
    name: str
    host_id: str | None = None
    token_id: int | None = None


LOCAL: Final = Principal("admin", "local")
"""Whoever calls a registry that is bound to loopback without a token."""


def create(
    tx: Session, role: str, name: str, ttl: float | None = None, host_id: str | None = None, *, actor: str = ""
) -> str:
    """Make a token that lives `ttl` seconds (None: until revoked) and return it, the only time. Raises Invalid."""
    if role not in ROLES:
        raise Invalid(f"no role {role!r}: choose one of {', '.join(ROLES)}")
    if role == "host" and host_id is None:
        raise Invalid("a host token is of one host: give its id, or create an enrol token")
    if ttl is not None and ttl <= 0:
        raise Invalid(f"a token that lives {ttl:g} s is of no use: give a positive time")
    bearer = _PREFIX + secrets.token_urlsafe(32)
    expires = None if ttl is None else db.clock(tx) + ttl
    _add(tx, Token(hash=_hash(bearer), role=role, name=name, host_id=host_id, expires_at=expires), actor=actor)
    return bearer


def authenticate(tx: Session, bearer: str) -> Principal:
    """Return whose token this is. Raises Unauthorized, saying no more than that."""
    token = tx.scalars(select(Token).where(col(Token.hash) == _hash(bearer), *_valid(db.now()))).one_or_none()
    if token is None or token.id is None:
        raise Unauthorized("this token is unknown, expired, revoked or used up")
    return Principal(token.role, token.name or f"{token.role}-{token.id}", token.host_id, token.id)


def redeem(tx: Session, principal: Principal) -> None:
    """Use up a one-time token. Raises Unauthorized when somebody was faster."""
    unused = update(Token).where(col(Token.id) == principal.token_id, col(Token.used_at).is_(None))
    if tx.execute(unused.values(used_at=db.now()).returning(col(Token.id))).one_or_none() is None:
        raise Unauthorized("this enrolment token is used up: create another one")


def revoke(tx: Session, token_id: int, *, actor: str = "") -> Token:
    """End a token at once. Raises NotFound; revoking twice is no error."""
    token = tx.get(Token, token_id)
    if token is None:
        raise NotFound("token", token_id)
    if token.revoked_at is None:
        token.revoked_at = db.clock(tx)
        tx.add(token)
        _event(tx, "token.revoked", token, actor)
    return token


def revoke_host(tx: Session, host_id: str) -> None:
    """End every token that is bound to a host."""
    bound = update(Token).where(col(Token.host_id) == host_id, col(Token.revoked_at).is_(None))
    tx.execute(bound.values(revoked_at=db.now()))


def listing(tx: Session, *, before: int | None = None, limit: int = 100) -> Sequence[Token]:
    """Return tokens' rows, newest first, those with an id under `before`."""
    found = select(Token).order_by(col(Token.id).desc()).limit(limit)
    return tx.scalars(found if before is None else found.where(col(Token.id) < before)).all()


def has_admin(tx: Session) -> bool:
    """Say whether some valid token can administer: without one a registry off loopback is of no use to anybody."""
    admin = select(col(Token.id)).where(col(Token.role) == "admin", *_valid(db.now())).limit(1)
    return tx.execute(admin).first() is not None


def bootstrap(tx: Session, name: str = "first admin") -> str | None:
    """Create the first admin token, for whoever holds the database; None when there is a valid one already."""
    return None if has_admin(tx) else create(tx, "admin", name, actor="bootstrap")


def adopt(tx: Session, bearer: str, name: str) -> None:
    """Make an admin token of a secret that the operator chose. Raises Invalid for one that could be guessed."""
    if len(bearer) < _LEAST:
        raise Invalid(f"the token {name} has {len(bearer)} characters: an admin's own token has at least {_LEAST}")
    _add(tx, Token(hash=_hash(bearer), role="admin", name=name), actor="bootstrap")


def require(principal: Principal, roles: frozenset[str]) -> None:
    """Raise Forbidden unless the principal's role is one of `roles`."""
    if principal.role not in roles:
        raise Forbidden(f"a {principal.role} token cannot do this: it takes {' or '.join(sorted(roles))}")


def _valid(now: db.now) -> tuple[Any, ...]:
    return (
        col(Token.revoked_at).is_(None),
        col(Token.used_at).is_(None),
        or_(col(Token.expires_at).is_(None), col(Token.expires_at) > now),
    )


def _hash(bearer: str) -> str:
    """Plain SHA-256 is enough here: there is nothing to guess in 256 random bits."""
    return hashlib.sha256(bearer.encode("utf-8", "surrogateescape")).hexdigest()


def _add(tx: Session, token: Token, *, actor: str) -> None:
    tx.add(token)
    tx.flush()
    _event(tx, "token.created", token, actor)


def _event(tx: Session, kind: str, token: Token, actor: str) -> None:
    after = {"role": token.role, "name": token.name, "host": token.host_id}
    events.record(tx, kind, subject=f"token:{token.id}", after=after, actor=actor)
