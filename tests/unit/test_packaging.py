"""What a room imports, the extra that it is installed with brings."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TYPES_ONLY = {"_typeshed", "mypy_boto3_s3"}
"""Imported by a type checker alone."""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wished(extra: str) -> Iterator[Requirement]:
    """The requirements of an extra of ours, with those of the extras in it."""
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            for inner in requirement.extras:
                yield from wished(inner)
        else:
            yield requirement


def installed(wanted: list[Requirement]) -> set[str]:
    """These distributions and all that they bring along, without extras that nobody asked for."""
    found: set[tuple[str, str]] = set()
    waiting = [(plain(one.name), extra) for one in wanted for extra in ("", *one.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            texts = requires(name) or []
        except PackageNotFoundError:  # for another platform
            continue
        for inner in map(Requirement, texts):
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                waiting += [(plain(inner.name), one) for one in ("", *inner.extras)]
    return {name for name, _ in found}


def imported(room: Path) -> Iterator[tuple[str, Path]]:
    """The top modules of others that a room's files import, with the file."""
    for file in sorted(room.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - {"weighbridge", *sys.stdlib_module_names}:
                yield top, file


@pytest.mark.parametrize(
    ("room", "extras"),
    [
        ("storage", ["daemon", "engine"]),  # watching is the daemon's, publishing tensors a trainer's
        ("registry", ["registry", "frames"]),
        ("daemon", ["up"]),
        ("engines", ["engine", "onnx", "torchao", "variants"]),
        ("hosts", ["host", "onnx"]),
        ("workers", ["worker", "variants", "gpu"]),
        ("weighbridge/report", ["report"]),
        ("weighbridge/demo", ["demo"]),
        ("weighbridge/cli", ["all"]),
    ],
)
def test_a_room_finds_what_it_imports(room: str, extras: list[str]) -> None:
    """Not only on a developer's machine, where other extras brought it."""
    base = list(map(Requirement, PROJECT["dependencies"]))
    brought = installed(base + [one for extra in extras for one in wished(extra)])
    homes = packages_distributions()
    missing = {
        f"{file.relative_to(ROOT)} imports {top}"
        for top, file in imported(ROOT / room)
        if top not in TYPES_ONLY and not {plain(home) for home in homes.get(top, [top])} & brought
    }
    assert not missing
