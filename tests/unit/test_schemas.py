"""The wire types beside the tables, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import BaseModel
from sqlmodel import SQLModel

from weighbridge.registry import models, schemas

DERIVED: dict[str, set[str]] = {
    "Model": {"latest", "aliases", "tags"},
    "Variant": {"metrics", "gates", "jobs"},
    "Version": {"model", "aliases", "tags"},
    "VersionDetail": {
        *("model", "aliases", "tags", "recipe", "recipe_ignored"),
        *("files", "variants", "variants_settled", "jobs", "metadata", "file_metadata"),
    },
    "VariantBenchmark": {"variant"},
    "Host": {"silent", "silent_seconds", "assignments"},
    "AssignmentView": {"model"},
    "Rollout": {"model", "waves", "steps"},
    "Alias": {"model"},
}
"""Wire fields that come from other tables or are computed."""

PAIRS: list[tuple[type[BaseModel], type[SQLModel]]] = [
    (schemas.Model, models.Model),
    (schemas.Metric, models.Metric),
    (schemas.GateResult, models.GateResult),
    (schemas.File, models.CheckpointFile),
    (schemas.Job, models.Job),
    (schemas.Variant, models.Variant),
    (schemas.VariantTensor, models.VariantTensor),
    (schemas.Benchmark, models.Benchmark),
    (schemas.VariantBenchmark, models.Benchmark),
    (schemas.Worker, models.WorkerNode),
    (schemas.Version, models.Version),
    (schemas.VersionDetail, models.Version),
    (schemas.Checkpoint, models.Checkpoint),
    (schemas.Template, models.Template),
    (schemas.Event, models.Event),
    (schemas.Host, models.Host),
    (schemas.AssignmentView, models.Assignment),
    (schemas.Rollout, models.Rollout),
    (schemas.RolloutStep, models.RolloutStep),
]


@pytest.mark.parametrize(("wire", "table"), PAIRS, ids=lambda kind: kind.__name__)
def test_wire_fields_are_columns(wire: type[BaseModel], table: type[SQLModel]) -> None:
    """A field on the wire is a column of its table, or is listed as derived; so that neither drifts alone."""
    derived = DERIVED.get(wire.__name__, set())
    assert set(wire.model_fields) - set(table.model_fields) == derived


def test_importing_the_wire_types_imports_no_sql() -> None:
    """Clients and hosts pay for pydantic only."""
    heavy = "{'sqlmodel', 'sqlalchemy', 'torch', 'celery', 'fastapi', 'alembic'}"
    code = f"import sys, weighbridge.registry.schemas; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_older_client_reads_a_newer_answer() -> None:
    """Unknown fields are ignored."""
    assert schemas.Metric.model_validate({"name": "f1", "value": 1, "new": 2}).name == "f1"
