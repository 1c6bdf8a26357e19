"""Alembic's revisions of the schema; `Database.upgrade` runs them. No data is computed here."""
