"""Which program a checkpoint belongs to: as the recipe wishes, else by fingerprint; only what the operator allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

from weighbridge.engines.binding import Parameter, Tensors, bind, matches
from weighbridge.engines.errors import BindingError, LoadError
from weighbridge.engines.manifest import Program, TensorSpec
from weighbridge.registry.recipe import ProgramWish
from weighbridge.workers.ours import raise_ours

_LONGEST = 300
"""Characters of an error that a reason repeats."""


@dataclass(frozen=True)
class TemplateInfo:
    """A registered template, as the registry recorded it."""

    name: str
    digest: str
    fingerprint: str
    parameters: Mapping[str, Parameter]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Bound:
    """A program with its contract, {tensor → parameter}, and what the program knows of its parameters.

    `notes`: what of the contract could not be found.
    """

    program: Program
    binding: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Mapping[str, Parameter]
    notes: tuple[str, ...] = ()


class Row(Protocol):
    """What the registry keeps of a template."""

    name: str
    digest: str
    fingerprint: str
    parameters: dict[str, Any]
    inputs: list[Any]
    outputs: list[Any]


class Unbound(Exception):
    """No single program; the message says what differs and what to do."""


@dataclass(frozen=True)
class Programs:
    """What the operator allows (`template:NAME`, `factory:module:name` patterns) out of what is registered.

    `malformed`: {template: why its row says nothing}; it harms the checkpoints that it is for, and no others.
    """

    templates: Sequence[TemplateInfo] = ()
    allowed: Sequence[str] = ("template:*",)
    malformed: Mapping[str, str] = field(default_factory=dict)

    def allows(self, program: str) -> bool:
        return any(fnmatchcase(program, pattern) for pattern in self.allowed)


def of_rows(rows: Iterable[Row]) -> tuple[tuple[TemplateInfo, ...], dict[str, str]]:
    """What the registry's rows say: the templates, and why those that do not parse say nothing."""
    known, malformed = [], {}
    for row in rows:
        try:
            known.append(_of_row(row))
        except (ValueError, TypeError, AttributeError) as exc:
            malformed[row.name] = f"its row does not parse: {str(exc)[:_LONGEST]}"
    return tuple(known), malformed


def _of_row(row: Row) -> TemplateInfo:
    return TemplateInfo(
        name=row.name,
        digest=row.digest,
        fingerprint=row.fingerprint,
        parameters={name: Parameter.model_validate(value) for name, value in row.parameters.items()},
        inputs=tuple(TensorSpec.model_validate(spec) for spec in row.inputs),
        outputs=tuple(TensorSpec.model_validate(spec) for spec in row.outputs),
    )


def find(
    tensors: Tensors,
    programs: Programs,
    wish: ProgramWish | None = None,
    inputs: tuple[TensorSpec, ...] = (),
    outputs: tuple[TensorSpec, ...] = (),
) -> Bound:
    """Bind by the wish or by fingerprint; `inputs` and `outputs` are a factory's, from the recipe. Raises Unbound."""
    if wish is not None and wish.factory is not None:
        return _by_factory(tensors, programs, wish.factory, inputs, outputs)
    templates = [one for one in programs.templates if programs.allows(f"template:{one.name}")]
    if wish is not None and wish.template is not None:
        return _by_name(tensors, programs, wish.template)
    fitting = [one for one in templates if matches(tensors, one.parameters)]
    if len(fitting) == 1:
        return _bound(tensors, fitting[0])
    if fitting:
        listed = ", ".join(sorted(one.name for one in fitting))
        raise Unbound(
            f"several templates have this fingerprint: {listed}; name one in recipe.yaml (program: template:)"
        )
    broken = "".join(f"; template {name} may fit, but {why}" for name, why in sorted(programs.malformed.items()))
    if not templates:
        raise Unbound(
            "no template is registered and allowed for this model: `weighbridge template add`, or a recipe" + broken
        )
    nearest = min(templates, key=lambda one: (_distance(tensors, one), one.name))
    raise Unbound(
        f"no template has this fingerprint; the nearest is {nearest.name}: {_difference(tensors, nearest)}{broken}"
    )


def _by_name(tensors: Tensors, programs: Programs, name: str) -> Bound:
    if not programs.allows(f"template:{name}"):
        raise Unbound(f"template:{name} is not allowed by the operator (allowed: {', '.join(programs.allowed)})")
    if name in programs.malformed:
        raise Unbound(f"recipe.yaml names the template {name}, but {programs.malformed[name]}: add it again")
    template = next((one for one in programs.templates if one.name == name), None)
    if template is None:
        raise Unbound(f"recipe.yaml names the template {name}, which is not registered: `weighbridge template add`")
    return _bound(tensors, template)


def _bound(tensors: Tensors, template: TemplateInfo) -> Bound:
    try:
        binding = bind(tensors, template.parameters, cast=True)
    except BindingError as exc:
        raise Unbound(f"the tensors are not those of template {template.name}: {exc}") from exc
    program = Program(kind="template", name=template.name, digest=template.digest)
    return Bound(program, binding, template.inputs, template.outputs, template.parameters, _unknown(template))


def _unknown(template: TemplateInfo) -> tuple[str, ...]:
    """A template from before contracts: nothing is known of its free lengths, nor of its integers."""
    free = [spec.name for spec in template.inputs if -1 in spec.shape[1:] and not spec.lengths]
    note = f"template {template.name} has no contract (lengths and values of {', '.join(free)}): add it again for one"
    return (note,) if free else ()


def _by_factory(
    tensors: Tensors,
    programs: Programs,
    factory: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> Bound:
    if not programs.allows(f"factory:{factory}"):
        raise Unbound(f"factory:{factory} is not allowed by the operator (allowed: {', '.join(programs.allowed)})")
    if not inputs or not outputs:
        raise Unbound(f"factory:{factory} needs inputs and outputs in recipe.yaml")
    from weighbridge.engines.factory import make
    from weighbridge.engines.template import describe_program, find_contract

    try:
        module = make(factory, [factory])
        parameters = describe_program(module)
        binding = bind(tensors, parameters, cast=True)
    except LoadError as exc:
        raise_ours(exc)
        raise Unbound(f"the tensors are not those of factory {factory}: {exc}") from exc
    try:
        found, notes = find_contract(module, inputs, [spec.name for spec in outputs])
    except LoadError as exc:
        raise_ours(exc)
        raise Unbound(f"factory:{factory} does not fit the recipe: {exc}") from exc
    return Bound(Program(kind="factory", name=factory), binding, found, outputs, parameters, notes)


def _distance(tensors: Tensors, template: TemplateInfo) -> int:
    try:
        bind(tensors, template.parameters)
    except BindingError as exc:
        return len(exc.missing) + len(exc.unexpected) + len(exc.mismatched)
    return 0


def _difference(tensors: Tensors, template: TemplateInfo) -> str:
    try:
        bind(tensors, template.parameters)
    except BindingError as exc:
        return str(exc)
    return "nothing"
