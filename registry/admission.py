"""Who is let in from a registry's start on: the operator's token, this user's own, and the hosts that start with it.

The administrator's token of a data folder is the operator's, where the settings have one, else one that was made here.
It lies in the data folder for the commands of this user, and only its hash in the database.
"""

from __future__ import annotations

import logging
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from weighbridge.registry import local, tokens
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import Forbidden
from weighbridge.registry.settings import RegistrySettings
from weighbridge.storage import private

logger = logging.getLogger(__name__)

_ENROL_SECONDS: Final = 86400.0
"""How long the tokens of hosts that start with the registry may wait for their host."""


def admit(db: Database, settings: RegistrySettings, data: Path | None) -> None:
    """Let in who must be able to call from the start on. `data` is the data folder that this registry answers for.

    Raises Forbidden when nobody could call, Invalid for an operator's token that could be guessed, NotPrivate.
    """
    given = settings.token.get_secret_value() if settings.token else None
    with db.transaction() as tx:
        if given is not None and not tokens.adopt(tx, given):
            logger.warning("registry.token was revoked: it lets nobody in; set another one, or none")
            given = None
        if data is not None:
            _keep(tx, data, given)
        elif not tokens.has_admin(tx):
            raise Forbidden(
                "nobody could call this registry: it has no admin token and no data folder to leave one in; give it "
                "one of your own as registry.token (WEIGHBRIDGE_TOKEN, e.g. from `openssl rand -base64 32`)"
            )
        _admit_hosts(tx, settings.enrolments)


def _keep(tx: Session, data: Path, given: str | None) -> None:
    """See to it that the token in the data folder is the one that counts; what it replaces ends."""
    kept = local.read_token(data)
    if kept is not None and kept == (given or kept) and _still_counts(tx, kept, given):
        return
    if kept is not None and (old := tokens.find(tx, kept)) is not None and kept != given:
        tokens.revoke(tx, old.id or 0, actor="registry")
    bearer = given or tokens.create(tx, "admin", user(), actor="registry")
    # Before the commit: after a crash in between the file holds what is no token, not the database one that nobody has.
    private.write(local.token_file(data), f"{bearer}\n".encode())


def _still_counts(tx: Session, kept: str, given: str | None) -> bool:
    """Whether the kept token is valid, and not the operator's of a time when the settings had one."""
    row = tokens.find(tx, kept)
    if row is None or row.role != "admin" or not tokens.is_valid(row):
        return False
    return given is not None or row.name != tokens.OPERATORS


def _admit_hosts(tx: Session, enrolments: Mapping[str, str]) -> None:
    for name, digest in enrolments.items():
        tokens.admit(tx, digest, "enrol", name, _ENROL_SECONDS)


def user() -> str:
    """The name of this process's user, as events tell it."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"
