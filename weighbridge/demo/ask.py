"""Ask a host for predictions as any client of the Open Inference Protocol would: HTTP and JSON."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np

from weighbridge.demo import digits
from weighbridge.demo.drops import MODEL

BATCH = 100


def accuracy(client: httpx.Client, url: str) -> float:
    """The share of held-out digits that the host at `url` reads rightly."""
    _, _, held_out = digits.load()
    right = 0
    for start in range(0, len(held_out.labels), BATCH):
        pixels = held_out.pixels[start : start + BATCH]
        logits = np.array(_infer(client, url, pixels), dtype=np.float32).reshape(len(pixels), 10)
        right += int((logits.argmax(1) == held_out.labels[start : start + BATCH]).sum())
    return right / len(held_out.labels)


def _infer(client: httpx.Client, url: str, pixels: Any) -> list[float]:
    tensor = {"name": digits.INPUT, "datatype": "FP32", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    answer = client.post(f"{url.rstrip('/')}/v2/models/{MODEL}/infer", json={"inputs": [tensor]})
    answer.raise_for_status()
    (output,) = answer.json()["outputs"]
    data: list[float] = output["data"]
    return data
