"""A program is a pure function: what keeps something, draws numbers or mixes rows becomes no template, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from weighbridge.engines import purity, template
from weighbridge.engines.errors import ImpureProgram
from weighbridge.engines.manifest import TensorSpec

X = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))


class Impure(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.calls, self.cache = 0, [torch.zeros(4)]
        vars(self)["forward"] = forward.__get__(self)


def averages(self: Any, x: Any) -> Any:
    self.mean.mul_(1 - 1e-5).add_(1e-5 * x.mean(0))
    return self.fc(x - self.mean)


def counts(self: Any, x: Any) -> Any:
    self.seen += 1
    return self.fc(x)


def calls(self: Any, x: Any) -> Any:
    self.calls += 1
    return self.fc(x)


def caches(self: Any, x: Any) -> Any:
    self.cache.append(x.detach())
    return self.fc(x) + self.cache[0]


def privately(self: Any, x: Any) -> Any:
    self._calls = getattr(self, "_calls", 0) + 1
    return self.fc(x)


def behind_torch(self: Any, x: Any) -> Any:
    self.fc.weight.data.mul_(1.0001)
    return self.fc(x)


def clipped(self: Any, x: Any) -> Any:
    with torch.no_grad():
        self.fc.weight.clamp_(-0.01, 0.01)
    return self.fc(x)


def in_place(self: Any, x: Any) -> Any:
    return self.fc(x.mul_(2))


def dropout(self: Any, x: Any) -> Any:
    return functional.dropout(self.fc(x), 0.5, training=True)


def rarely(self: Any, x: Any) -> Any:
    return functional.dropout(self.fc(x), 1e-9, training=True)


def noise(self: Any, x: Any) -> Any:
    return self.fc(x) + torch.rand(4)


def centred(self: Any, x: Any) -> Any:
    return self.fc(x - x.mean(0))


def over_rows(self: Any, x: Any) -> Any:
    return self.fc(x).softmax(0)


def trained_norm(self: Any, x: Any) -> Any:
    return functional.batch_norm(self.fc(x), None, None, training=True, eps=1.0) if len(x) > 1 else self.fc(x)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (averages, "changes mean"),
        (counts, "changes seen"),
        (calls, "changes calls"),
        (caches, "changes cache"),
        (privately, "changes _calls"),
        (behind_torch, "changes fc.weight"),
        (clipped, "changes fc.weight"),
        (in_place, "changes its input x in place"),
        (dropout, "random"),
        (rarely, "random: dropout"),
        (noise, "random"),
        (centred, "rows influence each other"),
        (over_rows, "rows influence each other"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_impure_program_becomes_no_template(forward: Any, said: str) -> None:
    """The buffer, the input or the line is named."""
    torch.manual_seed(0)
    with pytest.raises(ImpureProgram, match=said):
        template.build(Impure(forward), [X], unread=["*"])


def test_what_eval_mode_switches_off_is_pure() -> None:
    """Dropout and batch norms as modules, attention with its dropout of nothing, and an in-place step on its own."""

    class Usual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            y = self.act(self.norm(self.drop(self.fc(x))))
            return y + functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0]

    assert template.build(Usual(), [X]).outputs[0].shape == (-1, 4)


def test_weights_in_use_are_asked_too() -> None:
    """What an old template lets pass, a session that is asked x, y, x shows: the same input has another answer."""
    module = Impure(averages).eval()

    def answer(arrays: Any) -> Any:
        with torch.inference_mode():
            return {"y": module(torch.from_numpy(arrays["x"])).numpy()}

    x, y = (torch.randn(3, 4).numpy() for _ in range(2))
    with pytest.raises(ImpureProgram, match="changes mean"):
        purity.ask(answer, {"x": x}, {"x": y}, module)
    with pytest.raises(ImpureProgram, match="random"):
        purity.ask(answer, {"x": 1e9 * x}, {"x": y}, None)
