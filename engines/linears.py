"""Give an exported program its `nn.Linear` modules back, so that what quantizes or prunes linear layers finds them.

torch.export leaves calls of aten.linear (or of a product with a transposed weight) on bare parameters; torchao's
`quantize_`, which looks for modules, would do nothing, silently. State-dict names stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.mm.default)
_TRANSPOSED: dict[Callable[..., object], tuple[object, ...]] = {
    _aten.t.default: (),
    _aten.numpy_T.default: (),
    _aten.transpose.int: (0, 1),
    _aten.permute.default: ([1, 0],),
}
"""The calls that turn a weight [out, in] into [in, out], with their further arguments."""


@dataclass(frozen=True)
class _Call:
    """One linear call: `node` is x · weightᵀ + bias."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def rebuild(module: nn.Module) -> list[str]:
    """Replace in place the linear calls of an exported program by `nn.Linear`; return the layers' names, sorted.

    Left as they are: modules that are no exported program, weights that something else uses too (a tied embedding),
    parameters that are not just the `weight` and `bias` of one module. Values, `meta` ones too, are kept.
    """
    if not isinstance(module, fx.GraphModule):
        return []
    calls: dict[str, list[_Call]] = {}
    for call in _calls(module.graph):
        calls.setdefault(str(call.weight.target), []).append(call)
    rebuilt = [layer for target, found in calls.items() if (layer := _replace(module, target, found))]
    if rebuilt:
        module.graph.eliminate_dead_code()
        module.recompile()
    return sorted(rebuilt)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` by its name: those that a factory's module has and those that `rebuild` made."""
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


class HalfLinear(nn.Linear):
    """Multiplies in the weight's 16 bits; what comes in, what goes out and the bias are in the program's own dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


def halve(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Let the linear layers of a float32 program multiply in 16 bits where these weights have them; their names."""
    halved = set()
    for name, layer in linear_layers(module).items():
        weight = weights.get(f"{name}.weight")
        half = weight is not None and weight.dtype in (torch.bfloat16, torch.float16)
        if type(layer) is nn.Linear and half and layer.weight.dtype is torch.float32:
            layer.__class__ = HalfLinear
            halved.add(f"{name}.weight")
    return frozenset(halved)


def _calls(graph: fx.Graph) -> Iterator[_Call]:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        call = _read(node)
        if call is not None and all(one is None or one.op == "get_attr" for one in (call.weight, call.bias)):
            yield call


def _read(node: fx.Node) -> _Call | None:
    args = node.args
    if node.target is _aten.linear.default:
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and not isinstance(bias, (int, float, str)):
            return _Call(node, x, weight, bias if isinstance(bias, fx.Node) else None)
        return None
    if node.target in _PRODUCTS and isinstance(args[0], fx.Node):
        weight = _untransposed(args[1])
        return _Call(node, args[0], weight, None) if weight is not None else None
    if node.target is _aten.addmm.default and not node.kwargs:
        bias, x, weight = args[0], args[1], _untransposed(args[2])
        if isinstance(bias, fx.Node) and isinstance(x, fx.Node) and weight is not None:
            return _Call(node, x, weight, bias)
    return None


def _untransposed(node: object) -> fx.Node | None:
    """The weight of which `node` is the transpose."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    wanted = _TRANSPOSED.get(node.target)  # type: ignore[arg-type]
    if wanted is None or tuple(node.args[1:]) not in (wanted, wanted[::-1]):
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _replace(module: fx.GraphModule, target: str, calls: list[_Call]) -> str | None:
    """Make the one layer that these calls share. None where it would not be what it was."""
    layer, _, leaf = target.rpartition(".")
    if not layer or leaf != "weight" or not _only(module, target, calls):
        return None
    owner = module.get_submodule(layer)
    biases = {str(call.bias.target) if call.bias is not None else "" for call in calls}
    bias = owner._parameters.get("bias")
    if biases != {f"{layer}.bias" if bias is not None else ""}:
        return None
    if set(owner._parameters) - {"weight", "bias"} or owner._buffers or owner._modules:
        return None
    weight = owner._parameters["weight"]
    if weight is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    module.set_submodule(layer, _linear(weight, bias))
    for call in calls:
        now = _read(call.node)
        assert now is not None, "it was read as a linear call before"
        with module.graph.inserting_before(call.node):
            new = module.graph.call_module(layer, (now.x,))  # not call.x: that may have been a call just replaced
        new.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(new)
        module.graph.erase_node(call.node)
    return layer


def _only(module: fx.GraphModule, target: str, calls: list[_Call]) -> bool:
    """Whether these calls are all that uses the weight."""
    ours = {call.node for call in calls}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target == target:
            for user in node.users:
                uses = user.users if _untransposed(user) is node else (user,)
                if not set(uses) <= ours:
                    return False
    return True


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear.eval()
