"""Make a template from trusted operator code: a `.pt2` with the graph and its constants, without the weights.

`torch.export.load` can run code, so `open_template` demands the digest that the registry recorded, and nothing here may
be given a file from a bucket.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.export.passes
from blake3 import blake3
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen

from weighbridge.engines import calling, datatypes, nonfinite, purity, tensors
from weighbridge.engines.binding import Parameter, fingerprint
from weighbridge.engines.errors import ImpureProgram, LoadError, TemplateError
from weighbridge.engines.lengths import Assumed, assumed
from weighbridge.engines.manifest import Length, TensorSpec
from weighbridge.engines.protocols import Array, Arrays
from weighbridge.engines.ranges import IndexUses
from weighbridge.engines.trials import (
    Trials,
    allows,
    drawn,
    examples,
    rule_of,
    with_rule,
)
from weighbridge.engines.trials import example as example_length
from weighbridge.engines.trials import positional as positional_inputs

_EXAMPLE_ROWS = 3
"""Not 0 or 1, which torch.export takes for constants."""


@dataclass(frozen=True)
class Template:
    """A finished template: `pt2` is the file, `digest` its BLAKE3; the rest is what a registry records of it.

    `inputs` are in the order in which the program takes them, with the lengths and values that it takes. `notes` say
    what somebody who reads the contract would miss: where it is narrower than forward() itself.
    """

    pt2: bytes
    digest: str
    fingerprint: str
    parameters: dict[str, Parameter]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...] = ()


def build(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    output_names: Sequence[str] = (),
    example: Arrays | None = None,
    *,
    positional: bool = False,
    unread: Sequence[str] = (),
) -> Template:
    """Export `module` on CPU, strip its weights, prove that it binds and that it is a pure function; find its contract.

    Inputs and outputs bind by name (`engines.calling`), by their order where `positional`. A -1 in axis 0 is the batch,
    elsewhere a free length. `example`: inputs of two or more rows, for programs that random ones do not suit. `unread`:
    patterns of the parameters that the program may leave unread. Raises TemplateError.
    """
    module = module.eval()
    _refuse_meta(module)
    _refuse_datatypes(inputs)
    parameters = describe_program(module)
    kept = _state(module)
    specs = calling.adapt(module, inputs, output_names, positional=positional)
    try:
        with _quiet():
            return _Building(module, parameters, tuple(output_names), tuple(unread)).run(specs, example)
    finally:
        calling.restore(module)
        _put_back(module, kept)


class _Building:
    """One template in the making: `module` is adapted, on CPU, in eval mode."""

    def __init__(
        self, module: nn.Module, parameters: dict[str, Parameter], names: tuple[str, ...], unread: tuple[str, ...]
    ) -> None:
        self._module, self._parameters, self._names, self._unread = module, parameters, names, unread
        self._eager = Trials(module, None)
        self._notes: list[str] = []

    def run(self, specs: tuple[TensorSpec, ...], example: Arrays | None) -> Template:
        given = self._example(specs, example)
        self._names = self._output_names(specs, given)
        self._must_be_pure(self._module, specs, given)
        program, found = self._exported(specs, given)
        purity.ask_rows(self._answer(self._module, specs), specs, given)
        _refuse_strange(program)
        self._refuse_unread(program)
        uses = IndexUses(program, found.specs)
        found = self._ranged(found, uses, given if example is not None else None)
        pt2 = _strip_and_save(program)
        outputs, contract = self._compare(pt2, found, given if example is not None else None)
        parameters = self._parameters
        return Template(
            pt2, blake3(pt2).hexdigest(), fingerprint(parameters), parameters, contract, outputs, tuple(self._notes)
        )

    def contract(self, specs: tuple[TensorSpec, ...]) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
        """What the module itself takes: an export shows where it indexes, and bounds no path of it."""
        given = self._example(specs, None)
        self._names = self._output_names(specs, given)
        self._must_be_pure(self._module, specs, given)
        purity.ask_rows(self._answer(self._module, specs), specs, given)
        try:
            program, found = _export(self._module, specs, given)
            found = self._ranged(found, IndexUses(program, found.specs), None)
        except ImpureProgram:
            raise
        except TemplateError as exc:
            return specs, (f"lengths and values are not known: {exc}",)
        specs = found.specs
        for base in found.bases:
            known = rule_of(specs, base).maximum  # a branch of the export's, or the end of a table: it is tried
            wide = with_rule(specs, base, Length(axis=base[1]))
            specs = self._eager.bounded(wide, base, "", [known] if known is not None else [])
        return specs, ()

    def _example(self, specs: tuple[TensorSpec, ...], example: Arrays | None) -> dict[str, Array]:
        if example is not None:
            given = dict(example)
            tensors.check_inputs(given, specs)
            if self._eager.eager(specs, given) is None:
                raise TemplateError(f"{self._who}() fails on the example: {self._eager.failed}")
            return given
        first = ""
        for given in examples(specs, _EXAMPLE_ROWS):
            if self._eager.eager(specs, given) is not None:
                return given
            first = first or self._eager.failed
        raise TemplateError(f"{self._who}() fails on inputs of every length that was tried: {first}")

    @property
    def _who(self) -> str:
        return f"{type(self._module).__name__}.forward"

    def _output_names(self, specs: tuple[TensorSpec, ...], given: Arrays) -> tuple[str, ...]:
        """The names of what forward() returns: those wished, or all that it has."""
        inner = vars(self._module).pop("forward")
        try:
            with torch.inference_mode():
                result = inner.__wrapped__(*positional_inputs(specs, given))
        finally:
            vars(self._module)["forward"] = inner
        return tuple(calling.named(result, self._names))

    def _must_be_pure(self, module: nn.Module, specs: tuple[TensorSpec, ...], given: Arrays) -> None:
        """Asked twice, in both orders."""
        first = {name: np.array(array) for name, array in given.items()}
        second = {name: np.flip(array, 0).copy() for name, array in first.items()}
        purity.ask(self._answer(module, specs), first, second, module)

    def _answer(self, module: nn.Module, specs: tuple[TensorSpec, ...]) -> purity.Answer:
        def answer(arrays: Arrays) -> dict[str, Array]:
            rows = next((len(arrays[spec.name]) for spec in specs if spec.shape[:1] == (-1,)), 1)
            try:
                with torch.inference_mode():
                    results = module(*(datatypes.array_to_tensor(arrays[spec.name]) for spec in specs))
            except Exception as exc:  # whatever the operator's own forward raises
                raise TemplateError(f"{self._who}() fails on {rows} rows: {type(exc).__name__}: {exc}") from exc
            return {name: datatypes.tensor_to_array(one) for name, one in zip(self._names, results, strict=True)}

        return answer

    def _exported(self, specs: tuple[TensorSpec, ...], given: dict[str, Array]) -> tuple[ExportedProgram, Assumed]:
        """The export that assumes least; lengths that only an example fixed are exported with another one."""
        program, found = _export(self._module, specs, given)
        unread = [name for name in calling.swallowed(self._module) if name in found.unread]
        if unread:
            raise TemplateError(f"{self._who}(**kwargs) takes the input {unread[0]} and never reads it")
        for axis in found.fixed:
            if axis[1] == 0:
                raise TemplateError(f"the batch of {axis[0]} is fixed to {given[axis[0]].shape[0]}{found}")
        other = next((arrays for arrays in self._others(specs, given, found) if found.fixed), None)
        if other is not None:
            (name, number), length = found.fixed[0], given[found.fixed[0][0]].shape[found.fixed[0][1]]
            program, found = _export(self._module, specs, other)
            if found.fixed:
                raise TemplateError(
                    f"axis {number} of {name} is declared free, but an export is for one length of it (a loop, a "
                    f"recurrent layer, a length that is compared with {length}): declare it fixed{found}"
                )
        return program, found

    def _others(self, specs: tuple[TensorSpec, ...], given: Arrays, found: Assumed) -> Iterator[dict[str, Array]]:
        """Inputs that forward() takes, whose fixed lengths are other than the example's."""
        wished = {
            (spec.name, axis): given[spec.name].shape[axis]
            for spec in specs
            for axis, length in enumerate(spec.shape)
            if length == -1 and axis
        }
        for more in (1, 3, -1, 8, 16):
            arrays = drawn(
                specs, _EXAMPLE_ROWS, {**wished, **{axis: max(2, wished[axis] + more) for axis in found.fixed}}
            )
            if self._eager.eager(specs, arrays) is not None:
                yield arrays

    def _refuse_unread(self, program: ExportedProgram) -> None:
        """A parameter that the program does not read would take a tensor of each checkpoint without using it."""
        targets = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
        read = {targets[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.users and n.name in targets}
        groups: dict[str, set[str]] = {}
        for name, its in self._parameters.items():
            groups.setdefault(its.tied or name, set()).add(name)
        for names in groups.values():
            lost = sorted(name for name in names if self._parameters[name].dtype in datatypes.FLOATING)
            if not lost or names & read:
                continue  # integers are bookkeeping: how many batches a norm has seen
            self._parameters |= {name: self._parameters[name].model_copy(update={"unread": True}) for name in lost}
            if not any(fnmatchcase(lost[0], pattern) for pattern in self._unread):
                raise TemplateError(
                    f"{self._who}() never reads {lost[0]}: a checkpoint's tensor of that name would change nothing. "
                    f"Remove it, or say so (--unread {lost[0]!r})"
                )

    def _ranged(self, found: Assumed, uses: IndexUses, example: Arrays | None) -> Assumed:
        """With the values and lengths that the program's indices take."""
        specs = found.specs

        def make(wished: Mapping[tuple[str, int], int]) -> Arrays:
            return drawn(specs, _EXAMPLE_ROWS, wished)

        for base in found.bases:
            rule = rule_of(specs, base)
            longest = uses.longest(base, rule, make)
            specs = with_rule(specs, base, rule.model_copy(update={"maximum": longest}))
        values = uses.values(make)
        specs = tuple(spec.model_copy(update={"values": values.get(spec.name)}) for spec in specs)
        return replace(found, specs=specs)

    def _compare(
        self,
        pt2: bytes,
        found: Assumed,
        example: Arrays | None,
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Run other weights through the stripped file and through eager; derive the outputs and the last bounds."""
        weights = {name: _perturb(value) for name, value in self._module.state_dict().items()}
        for name, parameter in self._parameters.items():
            weights[name] = weights[parameter.tied or name]
        loaded = _load(pt2, "cpu")
        loaded.load_state_dict(weights, assign=True, strict=True)
        self._module.load_state_dict(weights, strict=True)
        trials, outside = Trials(self._module, loaded), str(found)
        shapes = self._rows(trials, found.specs, example, outside)
        specs = found.specs
        for base in found.bases:
            specs = trials.bounded(specs, base, outside, found.numbers)
            self._note(trials, specs, base, outside)
        trials.combined(specs, found.bases, outside)
        usual = drawn(specs, 2, {}, seed=7) if example is None else example
        self._must_be_pure(loaded, specs, usual)
        shapes += self._lengthened(trials, specs, found.bases)
        made = trials.eager(specs, usual)
        assert made is not None, "it was accepted before"
        outputs = tuple(
            TensorSpec(name=name, datatype=_datatype(name, value), shape=_free([shape[index] for shape in shapes]))
            for index, (name, value) in enumerate(zip(self._names, made, strict=True))
        )
        return outputs, specs

    def _rows(
        self, trials: Trials, specs: tuple[TensorSpec, ...], example: Arrays | None, outside: str
    ) -> list[list[tuple[int, ...]]]:
        """The outputs' shapes at several batch sizes."""
        sizes = (1, 2, _EXAMPLE_ROWS) if any(-1 in spec.shape[:1] for spec in specs) else (_EXAMPLE_ROWS,)
        shapes = []
        for size in sizes:
            arrays = drawn(specs, size, {}, seed=size) if example is None else tensors.rows(example, 0, size, specs)
            expected = trials.eager(specs, arrays)
            if expected is None:
                raise TemplateError(f"{self._who}() fails at batch size {size}: {trials.failed}")
            if difference := trials.differs(specs, arrays, expected):
                said = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
                raise TemplateError(f"for inputs of {said} the exported program {difference}{outside}")
            shapes.append([tuple(value.shape) for value in expected])
        return shapes

    def _lengthened(
        self, trials: Trials, specs: tuple[TensorSpec, ...], bases: Sequence[tuple[str, int]]
    ) -> list[list[tuple[int, ...]]]:
        """The outputs' shapes where each free length is another."""
        shapes = []
        for base in bases:
            rule = rule_of(specs, base)
            longer = example_length(rule) + rule.step
            length = longer if allows(rule, longer) else rule.minimum
            expected = trials.eager(specs, drawn(specs, 2, {base: length}))
            shapes += [[tuple(value.shape) for value in expected]] if expected is not None else []
        return shapes

    def _note(self, trials: Trials, specs: tuple[TensorSpec, ...], base: tuple[str, int], outside: str) -> None:
        """Say where the contract ends though forward() goes on."""
        rule = rule_of(specs, base)
        beyond = [rule.maximum + 1] if rule.maximum is not None else []
        beyond += [length for length in (rule.minimum - 1, rule.minimum + 1) if length > 1 and not allows(rule, length)]
        for length in beyond:
            wide = with_rule(specs, base, Length(axis=base[1], minimum=length, maximum=length))
            if trials.eager(wide, drawn(wide, 2, {base: length})) is not None:
                self._notes.append(
                    f"axis {base[1]} of {base[0]}: forward() takes {length} too, on another path{outside}"
                )
                return


def find_contract(
    module: nn.Module, inputs: Sequence[TensorSpec], output_names: Sequence[str]
) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    """The contract of a module that is served as it is (a factory's), and notes of what could not be found.

    Raises TemplateError where names do not fit, or where it is no pure function.
    """
    module = module.eval()
    kept = _state(module)
    specs = calling.adapt(module, inputs, output_names)
    try:
        with _quiet():
            return _Building(module, {}, tuple(output_names), ()).contract(specs)
    finally:
        calling.restore(module)
        _put_back(module, kept)


def open_template(path: Path, digest: str, device: str = "cpu") -> nn.Module:
    """Load a template as a module that takes and returns flat positional tensors; its weights are still on `meta`.

    Raises LoadError unless the file's BLAKE3 is `digest`, the one that the registry recorded.
    """
    data = path.read_bytes()
    seen = blake3(data).hexdigest()
    if seen != digest:
        raise LoadError(f"template {path.name}: the file's digest is {seen}, the registry recorded {digest}")
    return _load(data, device)


def _load(pt2: bytes, device: str) -> nn.Module:
    with _quiet():
        try:
            program = torch.export.load(io.BytesIO(pt2))
            if device != "cpu":
                program = torch.export.passes.move_to_device_pass(program, device)
            module = program.module(check_guards=False)
        except RuntimeError as exc:
            raise LoadError(f"torch {torch.__version__} cannot open the template on {device}: {exc}") from exc
    # Inputs are checked against their TensorSpecs; without pytrees and hooks a small call costs a third.
    module.graph.set_codegen(CodeGen())
    module.recompile()
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()
    return module


def describe(value: torch.Tensor, name: str, *, tied: str | None = None) -> Parameter:
    """Shape and dtype of a tensor. Raises TemplateError for a dtype that no protocol has (complex, float8 …)."""
    try:
        dtype = datatypes.to_safetensors(datatypes.from_torch(value.dtype))
    except KeyError as exc:
        raise TemplateError(f"{name}: dtype {value.dtype} is not supported") from exc
    return Parameter(shape=tuple(value.shape), dtype=dtype, tied=tied)


def describe_parameters(module: nn.Module) -> dict[str, Parameter]:
    """Every state-dict entry of a module: shape, dtype, and which entries are one storage. Raises TemplateError."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    found = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise TemplateError(f"{name}: extra state that is not a tensor cannot come from a checkpoint")
        root = first.setdefault((value.data_ptr(), tuple(value.shape)), name) if value.numel() else name
        found[name] = describe(value, name, tied=None if root == name else root)
    return found


def describe_program(module: nn.Module) -> dict[str, Parameter]:
    """`describe_parameters` of an operator's own module, whose NaN and infinities are meant. Raises TemplateError."""
    state = module.state_dict()
    return {
        name: its.model_copy(update={"nonfinite": nonfinite.digest(state[name])})
        for name, its in describe_parameters(module).items()
    }


def _refuse_datatypes(inputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        if spec.datatype == datatypes.BYTES or spec.datatype not in datatypes.NAMES:
            known = ", ".join(name for name in datatypes.NAMES if name != datatypes.BYTES)
            raise TemplateError(f"input {spec.name}: a program takes no {spec.datatype} ({known})")


def _refuse_meta(module: nn.Module) -> None:
    """A constant without values loads every key and answers wrong, silently."""
    state = [*module.named_parameters(), *module.named_buffers()]
    constants = [
        (f"{path}.{name}".lstrip("."), value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    ]
    for name, value in state + constants:
        if value.device.type != "cpu":
            raise TemplateError(f"{name} is on {value.device}: build the module on CPU, with real values")


def _export(module: nn.Module, specs: Sequence[TensorSpec], example: Arrays) -> tuple[ExportedProgram, Assumed]:
    batch = Dim("batch", min=1)
    dynamic = {
        name: {axis: batch if axis == 0 else Dim.AUTO for axis, length in enumerate(spec.shape) if length == -1}
        for name, spec in zip(calling.identifiers(specs), specs, strict=True)
    }
    try:
        program = torch.export.export(module, positional_inputs(specs, example), dynamic_shapes=dynamic)
    except Exception as exc:  # whatever the operator's own forward raises, besides the exporter's many kinds
        raise TemplateError(f"{type(module).__name__} cannot be exported: {_reason(exc)}") from exc
    if random := purity.random_operators(program.graph):
        raise ImpureProgram(f"forward() is random: {random[0]}; the same input must have one answer")
    return program, assumed(program, specs, {name: array.shape for name, array in example.items()})


def _reason(exc: Exception) -> str:
    """What the exporter said, without its advice, and the operator's line where it names one."""
    text = str(exc)
    line = re.search(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', text)
    text = text.split("Suggested fixes")[0].split("Caused by:")[0].split("consider using data-dependent")[0]
    text = text.split("The error above occurred when")[0].replace(
        'For more information, run with TORCH_LOGS="+dynamic".', ""
    )
    said = " ".join(part.strip(" -") for part in text.splitlines() if part.strip())
    data = "forward() decides on the values of its inputs, which an export cannot: " if "data-dependent" in text else ""
    at = f" ({line[1].rpartition('/')[2]}:{line[2]}: {line[3].strip()})" if line else ""
    return f"{data}{said}{at}"


def _refuse_strange(program: ExportedProgram) -> None:
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise TemplateError(f"constant {name} is on {value.device}: build the module on CPU, with real values")
    for node in program.graph.nodes:
        device = node.kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            raise TemplateError(f"{node.name} makes a tensor on {device}: use the input's device")


def _strip_and_save(program: ExportedProgram) -> bytes:
    state = program.state_dict
    for name, value in state.items():
        empty = torch.empty_like(value, device="meta")
        state[name] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
    program._example_inputs = None  # rows of somebody's data, and a pickle in the file
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def flat(result: Any) -> list[Any]:
    """The outputs of a module in order: a tensor, a tuple, a list, a dict, or any nesting of them."""
    return torch.utils._pytree.tree_leaves(result)


def _perturb(value: torch.Tensor) -> torch.Tensor:
    """Other weights of the same scale; what is positive (a running variance) stays so."""
    if not value.is_floating_point():
        return value.clone()
    return value * (0.9 + 0.2 * torch.rand_like(value)) + 0.02 * torch.rand_like(value)


def _datatype(name: str, value: torch.Tensor) -> str:
    try:
        return datatypes.from_torch(value.dtype)
    except KeyError as exc:
        raise TemplateError(f"output {name}: dtype {value.dtype} is not supported") from exc


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, also those that no checkpoint holds."""
    return {name: value.detach().clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


def _put_back(module: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name in kept and kept[name].shape == value.shape:
                value.copy_(kept[name])


def _free(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Where they agree, else -1."""
    return tuple(lengths[0] if len(set(lengths)) == 1 else -1 for lengths in zip(*shapes, strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals (deprecations, tree specs); nothing that an operator can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
