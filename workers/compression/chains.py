"""Which two layers of an exported program channels can be cut out between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from weighbridge.workers.compression.activations import names_by_storage

_aten = torch.ops.aten
_LINEAR = _aten.linear.default
_CONVS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
_CONVS_PADDED = (_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding)
_ELEMENTWISE = {
    *(_aten.relu.default, _aten.relu6.default, _aten.gelu.default, _aten.silu.default, _aten.tanh.default),
    *(_aten.sigmoid.default, _aten.hardtanh.default, _aten.hardswish.default, _aten.hardsigmoid.default),
    *(_aten.leaky_relu.default, _aten.elu.default, _aten.mish.default, _aten.clamp.default, _aten.softplus.default),
    *(_aten.dropout.default, _aten.clone.default, _aten.contiguous.default, _aten.alias.default),
    *(_aten.relu_.default, _aten.silu_.default, _aten.hardtanh_.default, _aten.leaky_relu_.default),
    *(_aten.relu6_.default, _aten.hardswish_.default, _aten.detach.default, _aten.feature_dropout.default),
}
_POOLS = {
    *(_aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default),
    *(_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default),
    *(_aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default, _aten.adaptive_avg_pool3d.default),
}
_FLATTEN = {_aten.flatten.using_ints, _aten.view.default, _aten.reshape.default}


@dataclass(frozen=True)
class Pair:
    """`producer` and `consumer` are weights; `beside`: vectors with one number for each channel (bias, batch norm).

    `spread`: columns of the consumer that one channel becomes (the pixels of a flattened image). `views`: nodes that
    flatten by a written number of columns.
    """

    producer: str
    consumer: str
    beside: tuple[str, ...]
    spread: int
    views: tuple[fx.Node, ...]


class _Stop(Exception):
    """Why a chain ends before a consumer."""


@dataclass
class _Walk:
    """Where a walk is: the node, the axis of its channels, and what was passed."""

    node: fx.Node
    axis: int
    beside: list[str]
    views: list[fx.Node]
    spread: int = 1


def find(module: fx.GraphModule) -> tuple[list[Pair], dict[str, str]]:
    """Every pair, and by weight the reason why it is cut in no pair as the producer."""
    shared = _shared(module)
    pairs, reasons = [], {}
    for node in module.graph.nodes:
        weight = _weight(node)
        if weight is None:
            continue
        try:
            pairs.append(_follow(node, weight, shared))
        except _Stop as stop:
            reasons[weight] = str(stop)
    return pairs, reasons


def reshape(module: fx.GraphModule, pairs: list[Pair]) -> None:
    """Let views that name the number of columns flatten what there is."""
    for view in (view for pair in pairs for view in pair.views):
        view.target, view.args = _aten.flatten.using_ints, (view.args[0], 1, -1)
    module.recompile()


def _shared(module: fx.GraphModule) -> set[str]:
    """Parameters with more than one name or more than one use."""
    shared = {name for names in names_by_storage(module).values() if len(names) > 1 for name in names}
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    return shared | {name for name, count in uses.items() if count > 1}


def _weight(node: fx.Node) -> str | None:
    """The weight of a linear or convolution node that is a parameter as it stands."""
    if node.op != "call_function" or node.target not in (_LINEAR, *_CONVS, *_CONVS_PADDED):
        return None
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _follow(producer: fx.Node, weight: str, shared: set[str]) -> Pair:
    if _groups(producer) != 1:
        raise _Stop("its convolution is grouped")
    if producer.target is not _LINEAR and _rank(producer) != _rank(producer.args[1]):
        raise _Stop("its convolution has no batch axis")
    walk = _Walk(producer, _rank(producer) - 1 if producer.target is _LINEAR else 1, [], [])
    if len(producer.args) > 2 and producer.args[2] is not None:
        walk.beside.append(_parameter(producer.args[2]))
    while True:
        user = _only_user(walk.node)
        consumer = _weight(user)
        if consumer is not None and user.args[0] is walk.node:
            break
        _step(walk, user)
    _check_consumer(walk, user)
    if taken := sorted({weight, consumer, *walk.beside} & shared):
        raise _Stop(f"{taken[0]} has another use")
    return Pair(weight, consumer, tuple(walk.beside), walk.spread, tuple(walk.views))


def _only_user(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) != 1:
        names = ", ".join(sorted(user.name for user in users))
        raise _Stop(f"its result has {len(users)} uses ({names})" if users else "its result is not used")
    if users[0].op == "output":
        raise _Stop("it gives an output")
    return users[0]


def _check_consumer(walk: _Walk, consumer: fx.Node) -> None:
    if _groups(consumer) != 1:
        raise _Stop(f"{_weight(consumer)} is a grouped convolution")
    expected = _rank(walk.node) - 1 if consumer.target is _LINEAR else 1
    if walk.axis != expected:
        raise _Stop(f"{_weight(consumer)} reads another axis than that of the channels")


def _step(walk: _Walk, user: fx.Node) -> None:
    """Go over one operation that keeps channels apart. Raises _Stop."""
    if user.args[:1] != (walk.node,) or user.op != "call_function":
        raise _Stop(f"{user.name} mixes it with something else")
    if user.target is _aten.batch_norm.default:
        if walk.axis != 1 or walk.spread != 1 or user.args[5]:
            raise _Stop(f"{user.name} normalizes another axis, or by the batch")
        walk.beside += [_parameter(value) for value in user.args[1:5] if value is not None]
    elif user.target in _FLATTEN:
        _flatten(walk, user)
    elif user.target in _POOLS:
        if walk.axis != 1 or _rank(walk.node) < 3:
            raise _Stop(f"{user.name} pools over the channels")
    elif user.target not in _ELEMENTWISE or any(isinstance(value, fx.Node) for value in user.args[1:]):
        raise _Stop(f"{user.name} ({user.target}) may mix channels")
    walk.node = user


def _flatten(walk: _Walk, user: fx.Node) -> None:
    """[rows, channels, …] → [rows, channels · …], where the sizes are known."""
    before, after = walk.node.meta["val"].shape, user.meta["val"].shape
    flat = walk.axis == 1 and len(after) == 2 and len(before) >= 2 and str(before[0]) == str(after[0])
    if not flat or not all(isinstance(size, int) for size in (*before[1:], after[1])):
        raise _Stop(f"{user.name} reshapes it by sizes that are not known")
    walk.spread *= int(after[1]) // int(before[1])
    if user.target is not _aten.flatten.using_ints:
        walk.views.append(user)


def _groups(node: fx.Node) -> int:
    if node.target is _LINEAR:
        return 1
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return groups if isinstance(groups, int) else 0


def _rank(node: object) -> int:
    assert isinstance(node, fx.Node), "a tensor comes from a node"
    return len(node.meta["val"].shape)


def _parameter(node: object) -> str:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise _Stop("its bias or its norm is calculated")
    return str(node.target)
