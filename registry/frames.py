"""A version's figures as pandas data frames. pandas is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from pandas import DataFrame

    from weighbridge.registry.client import Client

What = Literal["variants", "metrics", "gates", "tensors", "benchmarks", "rows"]
"""`rows` are those of the benchmarks: every scenario, mode, batch and concurrency."""


def frame(client: Client, what: What, model: str, version: int | str) -> DataFrame:
    """One row a figure, `variant` first. Raises ImportError without pandas, ValueError for another `what`."""
    if what not in get_args(What):
        raise ValueError(f"no frame {what!r}: there are {', '.join(get_args(What))}")
    try:
        import pandas
    except ImportError as exc:
        raise ImportError("data frames need pandas: pip install 'weighbridge[frames]'") from exc
    return pandas.DataFrame.from_records(list(_records(client, what, model, version)))


def _records(client: Client, what: What, model: str, version: int | str) -> Iterator[dict[str, Any]]:
    if what in ("benchmarks", "rows"):
        yield from _measured(client, what, model, version)
        return
    for variant in client.version(model, version).variants:
        if what == "variants":
            said = variant.model_dump(exclude={"metrics", "gates", "jobs", "wish", "facts", "name"})
            yield {"variant": variant.name, **said}
        elif what == "tensors":
            rows = client.tensors(model, version, variant.name)
            yield from ({"variant": variant.name, **one.model_dump()} for one in rows)
        else:
            found = variant.metrics if what == "metrics" else variant.gates
            yield from ({"variant": variant.name, **one.model_dump()} for one in found)


def _measured(client: Client, what: What, model: str, version: int | str) -> Iterator[dict[str, Any]]:
    for seen in client.benchmarks(model, version):
        if what == "benchmarks":
            said = seen.model_dump(exclude={"rows", "environment", "hardware", "variant"})
            yield {"variant": seen.variant, "hardware": seen.hardware.get("label", ""), **said}
        else:
            named = {"variant": seen.variant, "kind": seen.kind, "status": seen.status}
            yield from ({**named, **row.model_dump(exclude={"histogram"})} for row in seen.rows)
