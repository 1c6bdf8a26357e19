"""Both databases: transactions, the schema, outages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from fixtures.postgres import PostgresServer
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel, col, select

from weighbridge.registry import catalog, db, models
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Unavailable


def test_migrations_make_what_the_tables_say(database_url: str) -> None:
    """Autogenerate finds no difference between the upgraded schema and the metadata."""
    engine = create_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []
    engine.dispose()


def test_partial_indexes_are_partial(database_url: str) -> None:
    """Autogenerate does not compare an index's WHERE, so the schema itself is asked."""
    engine = create_engine(database_url)
    catalogue = {
        "sqlite": "SELECT name, sql FROM sqlite_master",
        "postgresql": "SELECT indexname, indexdef FROM pg_indexes",
    }
    with engine.connect() as connection:
        made: dict[str, str] = dict(connection.execute(text(catalogue[engine.dialect.name])).all())
    engine.dispose()
    assert "WHERE" in made["uq_rollout_active"]
    assert "rolling_back" in made["uq_rollout_active"]
    assert "WHERE" in made["ix_event_unsequenced"]


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_several_processes_upgrade_at_once(dialect: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Four start together on an empty database: the schema is made once and nobody fails."""
    url = f"sqlite:///{tmp_path}/new.db"
    if dialect == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        server.execute("DROP DATABASE IF EXISTS empty WITH (FORCE)")
        server.execute("CREATE DATABASE empty")
        url = server.url("empty")
    opened = [Database(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Database.upgrade, opened))
    for one in opened:
        one.check()
        one.close()


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_an_upgrade_keeps_what_is_there(dialect: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A registry of the release before, with a rollout under way: every row is kept, and what its hosts get."""
    url = f"sqlite:///{tmp_path}/old.db"
    if dialect == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        server.execute("DROP DATABASE IF EXISTS old WITH (FORCE)")
        server.execute("CREATE DATABASE old")
        url = server.url("old")
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(Path(db.__file__).parent / "migrations"))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for statement in _OLD.split(";"):
            connection.execute(text(statement))
    engine.dispose()
    database = Database(url)
    database.upgrade()
    with database.read() as tx:
        rollout, job = tx.get_one(models.Rollout, 1), tx.get_one(models.Job, 1)
        assert rollout.variants == {"": {"variant": "original", "artifact": "new", "reason": ""}}
        assert rollout.from_variants == {"": {"variant": "original", "artifact": "old", "reason": ""}}
        assert (job.part, job.needs, job.queue, job.key) == ("", {}, "cpu", "version:2:evaluate:1")
        variant = tx.get_one(models.Variant, 2)
        assert (variant.wish, variant.facts, variant.size, variant.artifact_digest) == ({}, {}, 0, "new")
        assert tx.get_one(models.Version, 2).train_pin is None
        assert len(list(tx.scalars(select(models.RolloutStep)))) == 1
    database.close()


_OLD = """
INSERT INTO model (id, name, description, next_version, revision, created_at) VALUES (1, 'digits', '', 3, 1, 0);
INSERT INTO version (id, model_id, number, path, status, reason, pins_digest, proof, proof_reason, unproven, evidence,
    facts, judgement, size, revision, created_at)
    SELECT id, 1, id, '', 'ready', '', 'pins-' || id, 'P2', '', FALSE, '{}', '{}', 1, 64, 1, 0
    FROM (SELECT 1 AS id UNION SELECT 2) AS two;
INSERT INTO variant (id, version_id, name, status, reason, artifact_digest, created_at)
    SELECT id, id, 'original', 'ready', '', CASE id WHEN 1 THEN 'old' ELSE 'new' END, 0 FROM version;
INSERT INTO job (id, key, subject_type, subject_id, stage, queue, state, attempt, max_attempts, not_before, progress,
    reason, outcome, created_at)
    VALUES (1, 'version:2:evaluate:1', 'version', 2, 'evaluate', 'cpu', 'queued', 0, 3, 0, 0, '', '{}', 0);
INSERT INTO rollout (id, model_id, fleet, number, variant, artifact_digest, from_number, status, reason, settings, wave,
    step, state, actor, revision, created_at)
    VALUES (1, 1, '{}', 2, 'original', 'new', 1, 'running', '', '{}', 1, 1, '{}', '', 1, 0);
INSERT INTO rollout_step (id, rollout_id, number, action, detail, observations, actor, created_at)
    VALUES (1, 1, 1, 'assign', '{}', '{}', '', 0)
"""


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    """An exception in the block rolls everything back and comes out as it is."""

    def fail() -> None:
        with database.transaction() as tx:
            catalog.ensure(tx, "digits", actor="test")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    with database.read() as tx:
        assert catalog.page(tx) == []


def test_a_read_never_writes(database: Database) -> None:
    """What a reader changes by mistake is not kept."""
    with database.transaction() as tx:
        model = catalog.ensure(tx, "digits", actor="test")
    with database.read() as tx:
        tx.get_one(models.Model, model.id).description = "changed"
    with database.read() as tx:
        assert catalog.get(tx, "digits").description == ""


def test_broken_rules_are_not_outages(database: Database) -> None:
    """A violated constraint stays what it is: retrying would not cure it."""
    with pytest.raises(IntegrityError), database.transaction() as tx:
        tx.add(models.Alias(model_id=99, name="x", number=1, updated_at=0.0))


def test_the_clock_is_the_databases(database: Database) -> None:
    """Seconds since the epoch, moving on within a transaction, stored with fractions."""
    with database.transaction() as tx:
        first = db.clock(tx)
        assert abs(first - time.time()) < 5
        row = models.Model(name="digits")
        tx.add(row)
        tx.flush()
        assert first <= row.created_at <= db.clock(tx)


def test_writers_wait_for_each_other(database: Database, open_again: Callable[[], Database]) -> None:
    """Read-then-write transactions of many processes and threads all get through: none is refused as locked."""
    processes = [open_again() for _ in range(3)]
    with database.transaction() as tx:
        catalog.ensure(tx, "digits", actor="test")
    locked = select(models.Model).where(col(models.Model.name) == "digits").with_for_update()

    def grow(number: int) -> None:
        with processes[number % 3].transaction() as tx:
            tx.scalars(locked).one().revision += 1

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(grow, range(48)))
    with database.read() as tx:
        assert catalog.get(tx, "digits").revision == 49


def test_check_names_an_old_schema(tmp_path: Path) -> None:
    """A database without this release's schema is refused with what to do."""
    database = Database(f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(Unavailable, match="revision none, this release needs 0007"):
        database.check()
    database.close()


def test_an_unreachable_file_is_unavailable(tmp_path: Path) -> None:
    """The message names the database and what to look at."""
    database = Database(f"sqlite:///{tmp_path}/no/such/folder.db")
    with pytest.raises(Unavailable, match=r"folder\.db: unable to open .* check that its folder exists"):
        database.check()
    database.close()


def test_an_unreachable_server_is_unavailable() -> None:
    """The message names the server without the password."""
    database = Database("postgresql://me:secret@127.0.0.1:1/weighbridge")
    with pytest.raises(Unavailable, match="check that the server runs") as caught, database.read():
        database.check()
    assert "secret" not in str(caught.value)
    database.close()


def test_it_goes_on_after_an_outage(postgres: PostgresServer, postgres_url: str) -> None:
    """A transaction cut off is Unavailable and rolled back; when the server is back, the same object works again."""
    database, name = Database(postgres_url), postgres_url.rpartition("/")[2]
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"

    def write_through_the_outage() -> None:
        with database.transaction() as tx:
            catalog.ensure(tx, "lost", actor="test")
            tx.flush()
            postgres.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            postgres.execute(cut)
            db.clock(tx)

    with pytest.raises(Unavailable):
        write_through_the_outage()
    with pytest.raises(Unavailable):
        database.check()
    postgres.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    with database.transaction() as tx:
        catalog.ensure(tx, "kept", actor="test")
    postgres.execute(cut)  # The pool holds a dead connection now, and finds out by itself.
    with database.read() as tx:
        assert [model.name for model in catalog.page(tx)] == ["kept"]
    database.close()


def test_a_database_in_memory_is_shared_by_threads() -> None:
    """Its one connection is lent to one thread at a time, and never twice to the same."""
    database = Database("sqlite://")
    database.upgrade()

    def create(number: int) -> None:
        with database.transaction() as tx:
            catalog.ensure(tx, f"model-{number}", actor="test")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, range(20)))
    with database.read() as tx:
        assert len(catalog.page(tx)) == 20
        with pytest.raises(RuntimeError, match="end it first"), database.transaction():
            pass
    database.close()


def test_readers_do_not_wait_for_a_writer(database: Database, open_again: Callable[[], Database]) -> None:
    """While one process writes, another reads what was committed before."""
    other, inside, leave = open_again(), threading.Event(), threading.Event()

    def write() -> None:
        with database.transaction() as tx:
            catalog.ensure(tx, "digits", actor="test")
            tx.flush()
            inside.set()
            assert leave.wait(10)

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(10)
    with other.read() as tx:
        assert catalog.page(tx) == []
    leave.set()
    writer.join(10)
    with other.read() as tx:
        assert len(catalog.page(tx)) == 1
