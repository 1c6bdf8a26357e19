"""Bearer tokens: 256 random bits, shown once, stored only as a hash; they expire, and are revoked at once."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import or_, select, update
from sqlmodel import col

from weighbridge import limits
from weighbridge.registry import db, events
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Forbidden, Invalid, NotFound, Unauthorized
from weighbridge.registry.models import Token

ROLES: Final = ("viewer", "publisher", "approver", "admin", "host", "enrol")
LINK, SESSION = "link", "session"
"""Kinds of token that nobody asks for by name: what a browser's address carries, once, and what it is exchanged for."""
OPERATORS: Final = "registry.token"
"""The name of the token that the settings give."""
_REPLACED: Final = f"{OPERATORS}, replaced"
_PREFIX: Final = "wb_"
"""Lets secret scanners know one when they see one."""
_LEAST: Final = 32
"""Characters of a token that an operator chose."""
_OURSELVES: Final = "registry"
"""The actor of what a registry does at its start."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `host_id` binds a host's or an enrolment token to one host; `token_id`: None within this process."""

    role: str
    name: str
    host_id: str | None = None
    token_id: int | None = None


def create(
    tx: Session, role: str, name: str, ttl: float | None = None, host_id: str | None = None, *, actor: str = ""
) -> str:
    """Make a token that lives `ttl` seconds (None: until revoked) and return it, the only time. Raises Invalid."""
    if role not in ROLES:
        raise Invalid(f"no role {role!r}: choose one of {', '.join(ROLES)}")
    if role == "host" and host_id is None:
        raise Invalid("a host token is of one host: give its id, or create an enrol token")
    if ttl is not None and not 0 < ttl <= limits.SECONDS:
        most = f"{limits.SECONDS / 86400:,.0f} days"
        raise Invalid(f"a token cannot live {ttl:g} s: give a time of at most {most}, or none for until it is revoked")
    if name == OPERATORS:
        raise Invalid(f"{name} is the name of the token in the registry's settings: choose another")
    return _mint(tx, role, name, ttl, host_id, actor=actor)


def authenticate(tx: Session, bearer: str) -> Principal:
    """Return whose token this is. Raises Unauthorized, saying no more than that."""
    token = tx.scalars(select(Token).where(col(Token.hash) == hash_of(bearer), *_valid(db.now()))).one_or_none()
    if token is None or token.id is None:
        raise Unauthorized("this token is unknown, expired, revoked or used up")
    return Principal(token.role, token.name or f"{token.role}-{token.id}", token.host_id, token.id)


def redeem(tx: Session, principal: Principal) -> None:
    """Use up a one-time token. Raises Unauthorized when somebody was faster."""
    unused = update(Token).where(col(Token.id) == principal.token_id, col(Token.used_at).is_(None))
    if tx.execute(unused.values(used_at=db.now()).returning(col(Token.id))).one_or_none() is None:
        raise Unauthorized("this one-time token is used up: create another one")


def link(tx: Session, who: Principal, ttl: float) -> str:
    """Make a token that a browser exchanges once, within `ttl` seconds, for a session that reads in this name."""
    return _mint(tx, LINK, who.name, ttl, actor=who.name)


def open_session(tx: Session, once: str, ttl: float) -> str:
    """Exchange a link's token for that of a session of `ttl` seconds. Raises Unauthorized: for any other, or used."""
    who = authenticate(tx, once)
    if who.role != LINK:
        raise Unauthorized("this is no one-time token of a browser's address")
    redeem(tx, who)
    return _mint(tx, SESSION, who.name, ttl, actor=who.name)


def in_session(tx: Session, bearer: str) -> Principal:
    """Whose session a browser's cookie is: a viewer's. Raises Unauthorized."""
    who = authenticate(tx, bearer)
    if who.role != SESSION:
        raise Unauthorized("the cookie is no session of this registry")
    return replace(who, role="viewer")


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


def find(tx: Session, bearer: str) -> Token | None:
    """The row of a token, whatever became of it."""
    return tx.scalars(select(Token).where(col(Token.hash) == hash_of(bearer))).one_or_none()


def is_valid(token: Token) -> bool:
    """Whether a token that never expires is in force."""
    return token.revoked_at is None and token.used_at is None and token.expires_at is None


def adopt(tx: Session, bearer: str) -> bool:
    """Make an admin's token of the secret that the operator chose, and end the one that it replaces.

    One that a person revoked stays so: then False. Raises Invalid for one that could be guessed, or has another role.
    """
    if len(bearer) < _LEAST:
        raise Invalid(f"the token {OPERATORS} has {len(bearer)} characters: an admin's own token has at least {_LEAST}")
    known = find(tx, bearer)
    if known is not None and known.role != "admin":
        raise Invalid(f"{OPERATORS} is token {known.id}, which is a {known.role}'s: choose another secret")
    if known is not None and known.revoked_at is not None and known.name != _REPLACED:
        return False
    earlier = select(Token).where(col(Token.name) == OPERATORS, col(Token.hash) != hash_of(bearer))
    for other in tx.scalars(earlier.where(*_valid(db.now()))).all():
        revoke(tx, other.id or 0, actor=_OURSELVES)
        other.name = _REPLACED
    if known is None:
        _insert(tx, Token(hash=hash_of(bearer), role="admin", name=OPERATORS))
    elif known.revoked_at is not None or known.expires_at is not None:
        known.name, known.revoked_at, known.expires_at = OPERATORS, None, None
        tx.add(known)
        _event(tx, "token.created", known, _OURSELVES)
    return True


def admit(tx: Session, digest: str, role: str, name: str, ttl: float) -> None:
    """Let in who has the token of this SHA-256, for `ttl` seconds: it was made elsewhere. Known ones stay."""
    _insert(tx, Token(hash=digest, role=role, name=name, expires_at=db.clock(tx) + ttl))


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


def new_bearer() -> str:
    """256 random bits as text."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_of(bearer: str) -> str:
    """Plain SHA-256 is enough here: there is nothing to guess in 256 random bits."""
    return hashlib.sha256(bearer.encode("utf-8", "surrogateescape")).hexdigest()


def _mint(
    tx: Session, role: str, name: str, ttl: float | None = None, host_id: str | None = None, *, actor: str
) -> str:
    bearer = new_bearer()
    expires = None if ttl is None else db.clock(tx) + ttl
    _add(tx, Token(hash=hash_of(bearer), role=role, name=name, host_id=host_id, expires_at=expires), actor=actor)
    return bearer


def _insert(tx: Session, token: Token) -> None:
    """Several registries that start at once have the same tokens to add."""
    if (added := db.insert_or_skip(tx, token)) is not None:
        _event(tx, "token.created", added, _OURSELVES)


def _add(tx: Session, token: Token, *, actor: str) -> None:
    tx.add(token)
    tx.flush()
    _event(tx, "token.created", token, actor)


def _event(tx: Session, kind: str, token: Token, actor: str) -> None:
    after = {"role": token.role, "name": token.name, "host": token.host_id}
    events.record(tx, kind, subject=f"token:{token.id}", after=after, actor=actor)
