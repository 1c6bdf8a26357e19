"""Names bind by name: from the inputs and outputs that an operator names to the ones that a module has.

Everything else here calls a program with flat tensors in one order and takes flat tensors back. That order is made
once, from forward()'s parameter names and from the keys of what it returns; what has no names is bound by position only
where the operator says so, or where there is one of it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weighbridge.engines.errors import TemplateError
from weighbridge.engines.manifest import TensorSpec

DEFAULT = "output"
"""What the one output of a module is called that nobody named."""


def adapt(
    module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[str] = (), *, positional: bool = False
) -> tuple[TensorSpec, ...]:
    """Make `module` take flat tensors, in the order of the specs returned, and give a tuple of tensors, as `outputs`.

    Without `outputs` it gives all that it has. Undone by `restore`. Raises TemplateError for names that forward()
    lacks; the module itself raises one, when it is called, for outputs that it does not return.
    """
    inner = module.forward
    ordered, keywords = _order(module, inputs, positional)
    known = inspect.signature(inner).parameters

    def call(*args: Any) -> Any:
        return inner(**dict(zip(keywords, args, strict=True))) if keywords else inner(*args)

    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(named(call(*args), outputs).values())

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # the exporter names inputs by it
        [inspect.Parameter(name, kind) for name in identifiers(ordered)]
    )
    forward.__wrapped__ = call  # type: ignore[attr-defined]
    forward.swallowed = [name for name in keywords if name not in known]  # type: ignore[attr-defined]
    forward.own = vars(module).get("forward")  # type: ignore[attr-defined]
    vars(module)["forward"] = forward
    return ordered


def restore(module: nn.Module) -> None:
    """Undo `adapt`."""
    own = vars(module).pop("forward").own
    if own is not None:
        vars(module)["forward"] = own


def swallowed(module: nn.Module) -> list[str]:
    """The inputs of an adapted module that only its **kwargs takes: whether it reads them, an export shows."""
    names: list[str] = vars(module)["forward"].swallowed
    return names


def identifiers(specs: Sequence[TensorSpec]) -> list[str]:
    """A Python name for each input, its own where it is one."""
    return [spec.name if spec.name.isidentifier() else f"input_{index}" for index, spec in enumerate(specs)]


def named(result: Any, names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """What a module returned, by output name: a mapping's keys (`a.b` for nested ones), else in order.

    Of a mapping, dataclass or named tuple any keys may be chosen, in any order; a plain tuple must be named whole.
    Raises TemplateError.
    """
    found, keyed = dict(_leaves(result)), _keyed(result)
    if not keyed:
        wished = tuple(names) or ((DEFAULT,) if len(found) == 1 else tuple(found))
        if len(found) != len(wished) or (len(found) > 1 and not names):
            said = f"named are {', '.join(names)}" if names else "none is named"
            raise TemplateError(f"the module returns {len(found)} values, {said}: name each tensor (--output)")
        found = dict(zip(wished, found.values(), strict=True))
    elif unknown := [name for name in names if name not in found]:
        raise TemplateError(f"the module returns {', '.join(found)}; there is no output {unknown[0]}")
    chosen = {name: found[name] for name in names or found}
    for index, (name, value) in enumerate(chosen.items()):
        if not isinstance(value, torch.Tensor):
            what = "None" if value is None else f"a {type(value).__name__}"
            raise TemplateError(
                f"output {name} (number {index + 1}) is {what}, not a tensor: name the others (--output)"
            )
    return chosen


def _order(
    module: nn.Module, inputs: Sequence[TensorSpec], positional: bool
) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    """The inputs in the order of forward()'s parameters, and by which of them each is given; none: by position."""
    given = {spec.name: spec for spec in inputs}
    if len(given) != len(inputs):
        raise TemplateError("two inputs have one name")
    parameters = inspect.signature(module.forward).parameters
    if positional or (len(inputs) == 1 and len(parameters) == 1 and inputs[0].name not in parameters):
        return tuple(inputs), ()  # one into one: there is nothing to mix up
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    taken = [name for name, kind in kinds.items() if kind in (_EITHER, inspect.Parameter.KEYWORD_ONLY)]
    anything = inspect.Parameter.VAR_KEYWORD in kinds.values()
    says = f"{type(module).__name__}.forward() takes {', '.join(map(_shown, parameters.values())) or 'nothing'}"
    unknown = [name for name in given if name not in taken]
    if unknown and not anything:
        raise TemplateError(
            f"{says}; there is no input {unknown[0]} (--positional binds inputs by their order instead)"
        )
    missing = [name for name in taken if name not in given and parameters[name].default is inspect.Parameter.empty]
    if missing:
        raise TemplateError(f"{says}; the input {missing[0]} is missing")
    ordered = [name for name in taken if name in given] + unknown
    return tuple(given[name] for name in ordered), tuple(ordered)


def _shown(parameter: inspect.Parameter) -> str:
    return str(parameter.replace(annotation=inspect.Parameter.empty))


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _keyed(result: Any) -> bool:
    """Whether there are keys in it, at any depth."""
    if isinstance(result, Mapping) or hasattr(result, "_fields") or dataclasses.is_dataclass(result):
        return True
    return isinstance(result, (tuple, list)) and any(_keyed(value) for value in result)


def _leaves(result: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(result, Mapping):
        items: Any = result.items()
    elif dataclasses.is_dataclass(result):
        items = ((field.name, getattr(result, field.name)) for field in dataclasses.fields(result))
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        items = zip(result._fields, result, strict=True)
    elif isinstance(result, (tuple, list)):
        items = enumerate(result)
    else:
        yield path, result
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
