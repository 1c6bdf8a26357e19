"""The documents against the code: examples parse, every command and flag exists, generated pages are current."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from weighbridge.cli.app import app
from weighbridge.cli.config import reference
from weighbridge.registry import recipe
from weighbridge.registry.lifecycle import VersionStatus
from weighbridge.registry.schemas import Desired, Enrolment, Observed
from weighbridge.settings import Settings, fields, load, variable

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy/README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> Iterator[Any]:
    """Every fenced block of a language, with its page."""
    for page in PAGES:
        for found, text in FENCE.findall(page.read_text()):
            if found == language:
                yield pytest.param(text, id=f"{page.name}:{text.strip().splitlines()[0][:40]}")


def test_the_settings_page_is_current() -> None:
    """`make docs` writes it."""
    assert (ROOT / "docs/settings.md").read_text() == reference()


@pytest.mark.parametrize("text", list(blocks("yaml")))
def test_recipes_in_the_documents_are_valid(text: str) -> None:
    """They can be copied."""
    recipe.parse(text)


def test_the_complete_recipe_is_complete() -> None:
    """The reference shows every field of every part, and those that a factory needs as comments."""
    (block,) = (block.values[0] for block in blocks("yaml") if str(block.id).startswith("recipe.md"))
    for model in (
        *(recipe.Recipe, recipe.ProgramWish, recipe.Gate, recipe.RolloutSettings),
        *(recipe.VariantWish, recipe.Recovery, recipe.Quality, recipe.Objective),
    ):
        for name in model.model_fields:
            assert re.search(rf"\b{name}\b", str(block)), f"{model.__name__}.{name}"
    policies = (ROOT / "docs/recipe.md").read_text().partition("## Policy")[2]
    assert [name for name in recipe.Policy.model_fields if f"{name} =" not in policies] == []


def test_every_verdict_is_explained() -> None:
    """All but the state before any verdict."""
    text = (ROOT / "docs/recipe.md").read_text()
    assert [s for s in VersionStatus if f"| `{s}` |" not in text] == [VersionStatus.DISCOVERED]


@pytest.mark.parametrize("text", list(blocks("toml")))
def test_settings_in_the_documents_are_valid(text: str) -> None:
    """They can be copied."""
    Settings.model_validate(tomllib.loads(text))


@pytest.mark.parametrize("text", list(blocks("python")))
def test_python_in_the_documents_compiles_and_imports(text: str) -> None:
    """Names that are imported from weighbridge are there; the README's example is ten lines."""
    compile(text, "<document>", "exec")
    for line in text.splitlines():
        if line.startswith("from weighbridge"):
            exec(line, {})
    assert len([line for line in text.splitlines() if line]) <= 10


def test_links_lead_somewhere() -> None:
    """Relative links and pictures of every page."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_opens_with_the_two_commands() -> None:
    """And both are targets of the Makefile."""
    text = (ROOT / "README.md").read_text()
    first = FENCE.search(text)
    assert first is not None
    assert text.index(first[0]) < 50
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in first[2].splitlines():
        assert shlex.split(line, comments=True)[1] in targets


def command_lines() -> Iterator[Any]:
    """Every use of `weighbridge …` in documents, units, compose and images."""
    for page in [*PAGES, ROOT / "deploy/env.example", ROOT / "CHANGELOG.md"]:
        text = page.read_text()
        for _, block in FENCE.findall(text):
            yield from (_case(page, line) for line in block.splitlines() if re.match(r"\s*weighbridge\s", line))
        yield from (_case(page, line) for line in re.findall(r"`(weighbridge [^`…|]+)`", text) if "[" not in line)
    for unit in sorted((ROOT / "deploy/systemd").glob("*.service")):
        (line,) = re.findall(r"^ExecStart=\S*/(weighbridge .*)$", unit.read_text(), re.MULTILINE)
        yield _case(unit, line)
    for name, service in compose()["services"].items():
        if service.get("image") == "weighbridge":
            yield _case(Path(f"compose:{name}"), shlex.join(["weighbridge", *service["command"]]))


def _case(page: Path, line: str) -> Any:
    return pytest.param(line.strip(), id=f"{page.name}:{line.strip()}")


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    return found


@pytest.mark.parametrize("line", list(command_lines()))
def test_every_command_that_is_written_down_exists(line: str) -> None:
    """Its name and its flags; nothing is run."""
    words = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        known = {opt: param for param in command.params for opt in param.opts}
        if (word := words.pop(0)).startswith("-"):
            assert word in known, f"no flag {word}"
            if not known[word].is_flag:
                words.pop(0)
        else:
            assert word in command.commands, f"no command {word}"
            command = command.commands[word]
    flags = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    assert {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)} <= flags


def test_the_deployed_settings_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """deploy/weighbridge.toml, with the environment that compose gives each role."""
    for service in compose()["services"].values():
        if service.get("image") != "weighbridge":
            continue
        names = set(service["environment"])
        assert names - {"WEIGHBRIDGE_TOKEN"} <= {variable(path) for path, _ in fields()}
        with monkeypatch.context() as patch:
            for name, value in service["environment"].items():
                patch.setenv(name, re.sub(r"\$\{[^}]*\}", "secret", value))
            assert load(config=ROOT / "deploy/weighbridge.toml").registry.port == 8400


def test_compose_names_only_what_it_has() -> None:
    """Services that others depend on, volumes, and variables of env.example."""
    found = compose()
    example = set(re.findall(r"^(\w+)=", (ROOT / "deploy/env.example").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / "deploy/compose.yaml").read_text())) == example
    for service in found["services"].values():
        assert set(service.get("depends_on", ())) <= set(found["services"])
        named = {volume.partition(":")[0] for volume in service.get("volumes", ())}
        assert named <= set(found["volumes"])


@pytest.mark.parametrize("unit", sorted((ROOT / "deploy/systemd").glob("*.service")), ids=lambda unit: unit.name)
def test_units_restart_and_are_hardened(unit: Path) -> None:
    """A Celery worker exits when its broker dies: whatever ends is started again, with no more rights than it needs."""
    lines = unit.read_text().splitlines()
    for wanted in (
        "Restart=always",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "CapabilityBoundingSet=",
        "UMask=0077",
    ):
        assert wanted in lines
    assert "Type=notify" in lines or unit.stem in ("weighbridge-worker", "weighbridge-host")


def test_the_constraints_pin_what_the_project_needs() -> None:
    """Every direct dependency has one exact version, and no registry is named."""
    text = (ROOT / "constraints.txt").read_text()
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ]", line)[0]).lower() for line in wanted}
    assert names - pinned - {"weighbridge"} == set()
    assert "torch==2.13.0\n" in text
    assert "://" not in text


def test_the_benchmarks_of_the_makefile_are_there() -> None:
    """`make bench` runs what exists."""
    (names,) = re.findall(r"^BENCHMARKS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in names.split() if not (ROOT / f"benchmarks/{name}.py").is_file()] == []


def test_messages_of_the_host_protocol_are_valid() -> None:
    """The examples are what the registry takes and answers."""
    text = (ROOT / "docs/host-protocol.md").read_text()
    enrolment, desired, observed = (json.loads(block) for kind, block in FENCE.findall(text) if kind == "json")
    for model, example in ((Enrolment, enrolment), (Desired, desired), (Observed, observed)):
        assert json.loads(model.model_validate(example).model_dump_json(exclude_unset=True)) == example
