"""Runs the revisions on the connection that `Database.upgrade` holds, inside its transaction and lock."""

from alembic import context

from weighbridge.registry import models

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=models.Model.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
