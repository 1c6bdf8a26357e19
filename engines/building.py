"""One template in the making: exported, tried against its module, and what it takes found out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from weighbridge.engines import calling, datatypes, exporting, purity, tensors
from weighbridge.engines.binding import Parameter
from weighbridge.engines.errors import ImpureProgram, TemplateError
from weighbridge.engines.lengths import Assumed
from weighbridge.engines.manifest import Length, TensorSpec
from weighbridge.engines.program import read
from weighbridge.engines.protocols import Array, Arrays
from weighbridge.engines.ranges import IndexUses
from weighbridge.engines.trials import Trials, allows, drawn, examples, rule_of, with_rule
from weighbridge.engines.trials import example as example_length
from weighbridge.engines.trials import positional as positional_inputs

_EXAMPLE_ROWS = 3
"""Not 0 or 1, which torch.export takes for constants."""


class Building:
    """One template in the making: `module` is adapted, on CPU, in eval mode."""

    def __init__(
        self, module: nn.Module, parameters: dict[str, Parameter], names: tuple[str, ...], unread: tuple[str, ...]
    ) -> None:
        self._module, self.parameters, self._names, self._unread = module, parameters, names, unread
        self._eager = Trials(module, None)
        self._untouched = purity.registered(module)
        self.notes: list[str] = []

    def run(
        self, specs: tuple[TensorSpec, ...], example: Arrays | None
    ) -> tuple[bytes, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The file, the inputs with what the program takes, and the outputs. Raises TemplateError."""
        given = self._example(specs, example)
        self._names = self._output_names(specs, given)
        self._must_be_pure(self._module, specs, given)
        program, found = self._exported(specs, given)
        purity.ask_rows(self._answer(self._module, specs), specs, given)
        exporting.refuse_strange(program)
        self._refuse_unread(program)
        uses = IndexUses(program, found.specs)
        found = self._ranged(found, uses, given if example is not None else None)
        pt2 = exporting.strip_and_save(program)
        outputs, contract = self._compare(pt2, found, given if example is not None else None)
        return pt2, contract, outputs

    def contract(self, specs: tuple[TensorSpec, ...]) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
        """The inputs with what the module itself takes, and notes. An export shows where it indexes, no more."""
        given = self._example(specs, None)
        self._names = self._output_names(specs, given)
        self._must_be_pure(self._module, specs, given)
        purity.ask_rows(self._answer(self._module, specs), specs, given)
        try:
            program, found = exporting.export(self._module, specs, given)
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
        lost = [name for names in self._lost(program) for name in names]
        return specs, (f"{self._who}() never reads {', '.join(lost)}",) if lost else ()

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
        untouched = self._untouched if module is self._module else None
        purity.ask(self._answer(module, specs), first, second, module, untouched)

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
        program, found = exporting.export(self._module, specs, given)
        unread = [name for name in calling.swallowed(self._module) if name in found.unread]
        if unread:
            raise TemplateError(f"{self._who}(**kwargs) takes the input {unread[0]} and never reads it")
        for axis in found.fixed:
            if axis[1] == 0:
                raise TemplateError(f"the batch of {axis[0]} is fixed to {given[axis[0]].shape[0]}{found}")
        other = next((arrays for arrays in self._others(specs, given, found) if found.fixed), None)
        if other is not None:
            (name, number), length = found.fixed[0], given[found.fixed[0][0]].shape[found.fixed[0][1]]
            program, found = exporting.export(self._module, specs, other)
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
        for lost in self._lost(program):
            self.parameters |= {name: self.parameters[name].model_copy(update={"unread": True}) for name in lost}
            if not any(fnmatchcase(lost[0], pattern) for pattern in self._unread):
                raise TemplateError(
                    f"{self._who}() never reads {lost[0]}: a checkpoint's tensor of that name would change nothing. "
                    f"Remove it, or say so (--unread {lost[0]!r})"
                )

    def _lost(self, program: ExportedProgram) -> Iterator[list[str]]:
        """The parameters that nothing reads, those that are tied together; integers count batches and the like."""
        targets = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
        read = {targets[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.users and n.name in targets}
        groups: dict[str, set[str]] = {}
        for name, its in self.parameters.items():
            groups.setdefault(its.tied or name, set()).add(name)
        for names in groups.values():
            lost = sorted(name for name in names if self.parameters[name].dtype in datatypes.FLOATING)
            if lost and not names & read:
                yield lost

    def _ranged(self, found: Assumed, uses: IndexUses, example: Arrays | None) -> Assumed:
        """With the values and lengths that the program's indices take."""
        specs = found.specs

        def make(wished: Mapping[tuple[str, int], int]) -> Arrays:
            shapes = tensors.shaped(specs, _EXAMPLE_ROWS, wished)
            dtypes = {spec.name: datatypes.to_numpy(spec.datatype) for spec in specs}
            return {name: np.broadcast_to(np.zeros((), dtypes[name]), shape) for name, shape in shapes.items()}

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
        for name, parameter in self.parameters.items():
            weights[name] = weights[parameter.tied or name]
        loaded = read(pt2)
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
        """Say where a branch ends the contract though forward() goes on."""
        if not outside:
            return
        rule = rule_of(specs, base)
        beyond = [rule.maximum + 1] if rule.maximum is not None else []
        beyond += [length for length in (rule.minimum - 1, rule.minimum + 1) if length > 1 and not allows(rule, length)]
        for length in beyond:
            wide = with_rule(specs, base, Length(axis=base[1], minimum=length, maximum=length))
            if trials.eager(wide, drawn(wide, 2, {base: length})) is not None:
                self.notes.append(
                    f"axis {base[1]} of {base[0]}: forward() takes {length} too, on another path{outside}"
                )
                return


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


def _free(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Where they agree, else -1."""
    return tuple(lengths[0] if len(set(lengths)) == 1 else -1 for lengths in zip(*shapes, strict=True))
