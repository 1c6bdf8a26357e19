"""Hosts: who they are, what they should hold, what they say that they hold.

Assignments are written by rollouts, observations by the hosts; neither ever writes the other's half.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import func, select
from sqlmodel import col

from weighbridge.registry import db, events, jobs, stored, tokens
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Conflict, Forbidden, Invalid, LeavesNothing, NotFound
from weighbridge.registry.models import ArtifactBlob, Assignment, Host, Model, Token
from weighbridge.registry.schemas import Desired, DesiredModel, Enrolled, Enrolment, Slot
from weighbridge.registry.spelling import MOST, nearest
from weighbridge.registry.tokens import Principal

SILENT = 15.0
"""Seconds without a word after which a host counts as silent, where no setting says otherwise."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def enrol(tx: Session, wanted: Enrolment, principal: Principal) -> Enrolled:
    """Register a host, or a new process of one: the epoch grows, and fences whatever ran before.

    An enrolment token is used up and becomes a host's own token. Only that one, a token that names the host, or an
    admin can enrol a host that is there already. Raises Forbidden, Conflict (retired), Invalid.
    """
    host = lock(tx, wanted.id) if wanted.id else None
    _may_enrol(principal, wanted.id, known=host is not None)
    if host is None:
        host = Host(id=_new_id(wanted.id), created_at=db.clock(tx))
    elif host.state != "enrolled":
        raise Conflict(f"host {host.id} is retired: enrol it as a new host, without its old id")
    first = host.epoch == 0
    host.name, host.url, host.labels, host.device = wanted.name, wanted.url, dict(wanted.labels), dict(wanted.device)
    host.epoch += 1
    host.seen_at = db.clock(tx)
    tx.add(host)
    tx.flush()
    after = {"name": host.name, "epoch": host.epoch, "labels": host.labels}
    events.record(
        tx, "host.enrolled" if first else "host.restarted", subject=f"host:{host.id}", after=after, actor=principal.name
    )
    return Enrolled(id=host.id, epoch=host.epoch, token=_host_token(tx, host, principal))


def _may_enrol(principal: Principal, host_id: str, *, known: bool) -> None:
    tokens.require(principal, frozenset({"enrol", "host", "admin"}))
    if principal.role == "host" and principal.host_id != host_id:
        raise Forbidden(f"this token is of host {principal.host_id}, not of {host_id or 'a new host'}")
    if principal.role == "enrol" and (known or principal.host_id) and principal.host_id != host_id:
        raise Forbidden(
            f"this enrolment token is not for host {host_id or '(new)'}: "
            "for a host that is there already, create one that names it"
        )


def _new_id(wanted: str) -> str:
    if not wanted:
        return secrets.token_hex(8)
    if not _ID.fullmatch(wanted):
        raise Invalid(f"{wanted!r} is no host id: up to 64 of letters, digits, '.', '_', '-'")
    return wanted


def _host_token(tx: Session, host: Host, principal: Principal) -> str | None:
    """The host's own token, in exchange for a one-time or an admin's; None for who has one already."""
    if principal.token_id is None or principal.role == "host":
        return None
    if principal.role == "enrol":
        tokens.redeem(tx, principal)
    tokens.revoke_host(tx, host.id)
    return tokens.create(tx, "host", host.name, host_id=host.id, actor=principal.name)


def lock(tx: Session, host_id: str) -> Host | None:
    """Return the host's row, locked: everything of one host happens one after the other."""
    return tx.get(Host, host_id, with_for_update=True, populate_existing=True)


def get(tx: Session, host_id: str) -> Host:
    """Return a host. Raises NotFound."""
    host = tx.get(Host, host_id)
    if host is None:
        raise _no_host(tx, host_id)
    return host


def _no_host(tx: Session, host_id: str) -> NotFound:
    names = [name for row in tx.execute(select(col(Host.name), col(Host.id)).limit(MOST)) for name in row]
    return NotFound("host", host_id, nearest(host_id, names))


def desired(tx: Session, host_id: str) -> Desired:
    """Return everything that a host should hold. Raises NotFound, Conflict when it is retired.

    What of it cannot be read is a Conflict too: nobody knows then what it should hold.
    """
    host = get(tx, host_id)
    if host.state != "enrolled":
        raise Conflict(f"host {host_id} is retired")
    rows = tx.execute(
        select(Assignment, col(Model.name))
        .join(Model, col(Model.id) == col(Assignment.model_id))
        .where(col(Assignment.host_id) == host_id)
        .order_by(col(Model.name))
    ).all()
    models = [
        DesiredModel(model=name, generation=row.generation, slots=_slots(row, name)) for row, name in rows if row.slots
    ]
    return Desired(revision=host.desired_revision, models=models)


def _slots(row: Assignment, model: str) -> list[Slot]:
    return [stored.parse(Slot, slot, f"the slots of {model} on host {row.host_id}") for slot in row.slots]


def assign(tx: Session, host_id: str, model_id: int, slots: Iterable[Slot], rollout_id: int | None) -> Assignment:
    """Say what a host should hold of a model (nothing: unload it).

    Other slots than before are a new generation, which starts to count from zero and is not live yet. Raises NotFound,
    Conflict when the host is retired.
    """
    host = lock(tx, host_id)
    if host is None:
        raise _no_host(tx, host_id)
    if host.state != "enrolled":
        raise Conflict(f"host {host_id} is retired")
    wanted = [slot.model_dump() for slot in slots]
    row = tx.get(Assignment, (host_id, model_id), populate_existing=True)
    if row is not None and row.slots == wanted:
        row.rollout_id = rollout_id
    else:
        row = row or Assignment(host_id=host_id, model_id=model_id, generation=0, assigned_at=0.0)
        row.slots, row.rollout_id, row.generation = wanted, rollout_id, row.generation + 1
        row.requests = row.errors = row.input_errors = row.refused = 0
        row.assigned_at, row.live_at = db.clock(tx), None
        host.desired_revision += 1
        tx.add(host)
    tx.add(row)
    tx.flush()
    return row


def fleet(tx: Session, labels: Mapping[str, str]) -> Sequence[Host]:
    """Return the hosts that carry all of `labels`, in the order of their ids."""
    hosts = tx.scalars(select(Host).where(col(Host.state) == "enrolled").order_by(col(Host.id)))
    return [host for host in hosts if labels.items() <= host.labels.items()]


def retire(
    tx: Session, host_id: str, *, actor: str, reason: str = "", force: bool = False, silent_seconds: float = SILENT
) -> Host:
    """Take a host out for good: no assignments, its tokens end.

    Raises NotFound; LeavesNothing for the last host that serves a model, unless that is `force`d. Retiring twice is no
    error.
    """
    host = lock(tx, host_id)
    if host is None:
        raise _no_host(tx, host_id)
    if host.state == "retired":
        return host
    if not force and (alone := alone_with(tx, host, silent_seconds)):
        raise LeavesNothing(
            f"retiring host {host.name}",
            ", ".join(alone),
            hosts=[host.name],
            instead="start another host first",
        )
    for row in tx.scalars(select(Assignment).where(col(Assignment.host_id) == host_id)).all():
        if row.rollout_id is not None:
            jobs.wake(tx, "rollout", row.rollout_id)
        tx.delete(row)
    host.state = "retired"
    host.desired_revision += 1
    tx.add(host)
    tokens.revoke_host(tx, host_id)
    tx.flush()
    events.record(tx, "host.retired", subject=f"host:{host_id}", after={"name": host.name}, actor=actor, reason=reason)
    return host


def alone_with(tx: Session, host: Host, silent_seconds: float = SILENT) -> list[str]:
    """The models that this host serves and no other one does. What is silent serves nothing."""
    served: dict[str, set[str]] = {}
    rows = tx.execute(
        select(Assignment, col(Model.name), Host)
        .join(Model, col(Model.id) == col(Assignment.model_id))
        .join(Host, col(Host.id) == col(Assignment.host_id))
        .where(col(Host.state) == "enrolled")
    )
    now = db.clock(tx)
    for row, model, holder in rows:
        if row.live_at is not None and row.slots and not is_silent(holder, now, silent_seconds):
            served.setdefault(model, set()).add(holder.id)
    return sorted(model for model, holders in served.items() if holders == {host.id})


def prove_idle(tx: Session, token_id: int, silent_seconds: float = SILENT) -> None:
    """Raise Conflict where a token is that of a host which serves: without it the host is cut off."""
    token = tx.get(Token, token_id)
    host = tx.get(Host, token.host_id) if token is not None and token.role == "host" and token.host_id else None
    if host is None or token is None or token.revoked_at is not None or host.state != "enrolled":
        return
    if not is_silent(host, db.clock(tx), silent_seconds):
        raise Conflict(
            f"token {token_id} is that of host {host.name}, which uses it: `weighbridge retire {host.name}` takes the "
            "host out; or force it (--force, force=true), and the host is cut off"
        )


def is_silent(host: Host, now: float, silent_seconds: float = SILENT) -> bool:
    """Whether nothing was heard of a host for so long, by the database's clock."""
    return host.seen_at is None or now - host.seen_at > silent_seconds


def may_fetch(tx: Session, host_id: str, digest: str) -> bool:
    """Say whether a blob is part of something that is assigned to the host."""
    rows = tx.scalars(select(col(Assignment.slots)).where(col(Assignment.host_id) == host_id)).all()
    artifacts = {slot["artifact"] for slots in rows for slot in slots}
    if digest in artifacts:
        return True
    part = select(col(ArtifactBlob.blob_digest)).where(
        col(ArtifactBlob.blob_digest) == digest, col(ArtifactBlob.artifact_digest).in_(artifacts)
    )
    return tx.execute(part.limit(1)).first() is not None


def count(tx: Session) -> int:
    """How many hosts are enrolled."""
    return tx.execute(select(func.count()).select_from(Host).where(col(Host.state) == "enrolled")).scalar_one()
