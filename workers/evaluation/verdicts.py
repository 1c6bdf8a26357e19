"""The verdicts of a version's gates, from its scores and the champion's. Pure.

A gate of a metric that the task does not have is not applicable, unless it is `required`: one policy is for models of
every task. Every other gate without evidence fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weighbridge.registry.recipe import Gate, Task
from weighbridge.registry.schemas import GateResult
from weighbridge.workers.evaluation import gates, tasks
from weighbridge.workers.evaluation.bootstrap import ERRORS


@dataclass(frozen=True)
class Compared:
    """The champion's scores on the same set, or why there are none; `number` is None without a champion."""

    number: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def concerns(gate: Gate, task: Task) -> bool:
    """Whether the gate is for this task: it has such a metric, or whoever set the gate requires one."""
    return gate.required or gate.metric in tasks.METRICS[task]


def judge(gate: Gate, task: Task, scores: Mapping[str, float], compared: Compared) -> list[GateResult]:
    """One result per bound of a gate; a metric of the task's that was not measured fails them."""
    results = []
    for bound, limit in _bounds(gate):
        name = f"{gate.metric}.{bound}"
        if not concerns(gate, task):
            results.append(_foreign(gate, bound, limit, task))
        elif gate.metric not in scores:
            results.append(gates.unmeasured(name, limit, f"{gate.metric} is not measured ({', '.join(scores)} are)"))
        elif bound == "max_drop":
            results.append(_drop(gate.metric, limit, scores[gate.metric], compared))
        else:
            results.append(gates.bound(name, gate.metric, scores[gate.metric], limit, least=bound == "min"))
    return results


def unmeasured(wanted: Sequence[Gate], task: Task, reason: str) -> list[GateResult]:
    """The results where nothing could be measured: what concerns the task fails."""
    return [
        gates.unmeasured(f"{gate.metric}.{bound}", limit, reason)
        if concerns(gate, task)
        else _foreign(gate, bound, limit, task)
        for gate in wanted
        for bound, limit in _bounds(gate)
    ]


def _foreign(gate: Gate, bound: str, limit: float, task: Task) -> GateResult:
    has = ", ".join(tasks.METRICS[task])
    reason = f"{gate.metric} is no metric of task: {task} ({has} are), and the gate is not `required`"
    return gates.not_applicable(f"{gate.metric}.{bound}", limit, reason)


def _drop(metric: str, limit: float, seen: float, champion: Compared) -> GateResult:
    """How much worse than the champion: less, or of an error more.

    A champion that cannot be evaluated fails the gate. None at all, or one that was evaluated and has no such number,
    leaves the decision to `min`.
    """
    gate = f"{metric}.max_drop"
    if champion.reason:
        return gates.unmeasured(gate, limit, f"{metric}: {champion.reason} (max_drop {limit:g})")
    if champion.number is None or metric not in champion.scores:
        whose = f"champion {champion.number} has none on this set" if champion.number else "there is no champion"
        return gates.not_applicable(gate, limit, f"{metric}: {whose} to compare with (max_drop {limit:g})")
    known = champion.scores[metric]
    drop = seen - known if metric in ERRORS else known - seen
    reason = f"{metric} {seen:.4g} is {abs(seen - known):.4g} {'below' if seen < known else 'above'} champion"
    reason += f" {champion.number}'s {known:.4g} (max_drop {limit:g})"
    return gates.result(gate, drop <= limit + 1e-12, drop, limit, reason)  # 0.9 − 0.8 is a little more than 0.1


def _bounds(gate: Gate) -> list[tuple[str, float]]:
    bounds = (("min", gate.min), ("max", gate.max), ("max_drop", gate.max_drop))
    return [(name, limit) for name, limit in bounds if limit is not None]
