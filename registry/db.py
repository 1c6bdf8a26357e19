"""One database, SQLite or PostgreSQL: transactions, the schema's upgrade, and foreign errors translated once.

Functions of the registry take an open `tx` (a Session) and never commit; whoever opened the transaction does, by
leaving its block, and sends jobs and rings bells after that.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, create_engine, event, exc, func, make_url, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from sqlmodel import SQLModel

from weighbridge.registry import columns
from weighbridge.registry.clock import now
from weighbridge.registry.errors import RegistryError, Unavailable
from weighbridge.storage import private

__all__ = ["Database", "Session", "clock", "insert_into", "insert_or_skip", "now"]

Row = TypeVar("Row", bound=SQLModel)

_BUSY_SECONDS = 30
"""How long a SQLite writer waits for the one before it."""
_CONNECT_SECONDS = 5
_LOCK_TIMEOUT, _IDLE_TIMEOUT = "10s", "30s"
"""A stopped process (SIGSTOP) keeps its PostgreSQL locks: the server ends its transaction, and nobody waits forever."""
_UPGRADE_LOCK = 0x77656967
"""Key of the advisory lock under which one process at a time upgrades the schema."""


class Database:
    """A pool of connections. Safe to share between threads; open one per process (not across a fork).

    `sqlite://` is a database in memory: its one connection is lent to one thread at a time.
    """

    def __init__(self, url: str | SecretStr) -> None:
        plain = url.get_secret_value() if isinstance(url, SecretStr) else url
        parsed = make_url(plain.replace("postgres://", "postgresql://", 1))
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.dialect = parsed.get_backend_name()
        self.url_safe = parsed.render_as_string(hide_password=True)
        memory = self.dialect == "sqlite" and parsed.database in (None, "", ":memory:")
        # Waiting in SQLite is sleeping, and starves the unlucky: threads that write take turns here instead.
        self._writing = _Turns() if self.dialect == "sqlite" else contextlib.nullcontext()
        self._reading = self._writing if memory else contextlib.nullcontext()
        if self.dialect == "sqlite":
            if not memory and parsed.database:
                _keep_private(Path(parsed.database))
            self._engine = _sqlite_engine(parsed.render_as_string(hide_password=False), memory=memory)
        elif self.dialect == "postgresql":
            self._engine = _postgresql_engine(parsed.render_as_string(hide_password=False))
        else:
            raise ValueError(f"database {self.url_safe}: {self.dialect} is not supported, use sqlite or postgresql")
        self._write = self._engine.execution_options(begin="BEGIN IMMEDIATE")
        self._read = self._engine.execution_options(postgresql_readonly=True)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Session]:
        """A write transaction: committed at the block's end, rolled back when it raises. Raises Unavailable."""
        with self._translated(), self._writing, Session(self._write, expire_on_commit=False) as tx, tx.begin():
            yield tx

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent look (on SQLite; per statement on PostgreSQL); nothing is ever written. Raises Unavailable."""
        with self._translated(), self._reading, Session(self._read, expire_on_commit=False, autoflush=False) as tx:
            yield tx

    def upgrade(self) -> None:
        """Bring the schema to the newest revision; several processes may do so at once. Raises Unavailable."""
        with self._translated(), self._writing, self._write.begin() as connection:
            if self.dialect == "postgresql":
                connection.execute(text("SET LOCAL lock_timeout = 0"))
                connection.execute(select(func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
            if _revision(connection) != _head():
                config = _config()
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

    def check(self) -> None:
        """Prove that the database answers and has this release's schema. Raises Unavailable with what to do."""
        with self._translated(), self._reading, self._read.connect() as connection:
            found, head = _revision(connection), _head()
        if found != head:
            raise Unavailable(
                f"database {self.url_safe}: its schema is at revision {found or 'none'}, this release needs {head}; "
                "start `weighbridge registry` of this release once, it upgrades the schema"
            )

    def close(self) -> None:
        """Close every pooled connection."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except exc.TimeoutError as error:
            raise Unavailable(f"database {self.url_safe}: every connection is in use; try again") from error
        except exc.DBAPIError as error:
            if not (isinstance(error, exc.OperationalError | exc.InterfaceError) or error.connection_invalidated):
                raise
            reason = str(error.orig).strip().splitlines()[0] if error.orig else str(error)
            raise Unavailable(f"database {self.url_safe}: {reason}; {self._advice()}") from error
        except exc.StatementError as error:  # a value that its column refused before SQL (registry.columns)
            if isinstance(error.orig, RegistryError):
                raise error.orig from None
            raise

    def _advice(self) -> str:
        if self.dialect == "sqlite":
            return "check that its folder exists and is writable, and that the disk has space"
        return "check that the server runs and that the URL's host, user and password are right"


class _Turns:
    """One thread at a time; one that would wait for itself is told so."""

    def __init__(self) -> None:
        self._lock, self._holder = threading.Lock(), 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._holder == me:
            raise RuntimeError("this thread has a transaction open on this database: end it first")
        if not self._lock.acquire(timeout=_BUSY_SECONDS):
            raise Unavailable(f"another thread has kept its transaction open for {_BUSY_SECONDS} s; try again")
        self._holder = me

    def __exit__(self, *_: object) -> None:
        self._holder = 0
        self._lock.release()


def _keep_private(file: Path) -> None:
    """Tokens' hashes and everybody's names lie in it. What SQLite puts beside it later has the file's own mode."""
    private.begin(file)
    for beside in ("-wal", "-shm", "-journal"):
        private.close(file.with_name(file.name + beside))


def _sqlite_engine(url: str, *, memory: bool) -> Engine:
    arguments: dict[str, Any] = {"connect_args": {"timeout": _BUSY_SECONDS, "check_same_thread": False}}
    arguments |= {"json_serializer": columns.dumps, "json_deserializer": columns.loads}
    engine = create_engine(url, **arguments, **({"poolclass": StaticPool} if memory else {}))

    # `synchronous` stays FULL: a commit that was answered also survives a power cut, for an fsync each.
    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None  # The driver begins nothing by itself: `begin` below does.
        connection.execute("PRAGMA foreign_keys = ON")
        if not memory:
            _use_wal(connection)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that turns into a writer fails with "locked", whatever the timeout says.
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


@tenacity.retry(wait=tenacity.wait_random(0, 0.05), stop=tenacity.stop_after_delay(_BUSY_SECONDS), reraise=True)
def _use_wal(connection: Any) -> None:
    """Changing the journal's mode does not wait for other connections, so it is tried again."""
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        connection.execute("PRAGMA journal_mode = WAL")


def _postgresql_engine(url: str) -> Engine:
    engine = create_engine(
        url,
        pool_pre_ping=True,
        connect_args={"connect_timeout": _CONNECT_SECONDS},
        json_serializer=columns.dumps,
        json_deserializer=columns.loads,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.execute(
            f"SET lock_timeout = '{_LOCK_TIMEOUT}'; SET idle_in_transaction_session_timeout = '{_IDLE_TIMEOUT}'"
        )
        connection.commit()

    return engine


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@functools.cache
def _head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def clock(tx: Session) -> float:
    """The database's time, seconds since the epoch."""
    return float(tx.execute(select(now())).scalar_one())


def insert_into(tx: Session, table: type[SQLModel]) -> postgresql.Insert | sqlite.Insert:
    """INSERT with the dialect's ON CONFLICT."""
    return postgresql.insert(table) if tx.get_bind().dialect.name == "postgresql" else sqlite.insert(table)


def insert_or_skip(tx: Session, row: Row) -> Row | None:
    """Insert the row unless a unique rule already holds one like it: then None, and the transaction lives on."""
    statement = insert_into(tx, type(row)).values(row.model_dump(exclude_none=True)).on_conflict_do_nothing()
    return tx.scalars(statement.returning(type(row))).one_or_none()
