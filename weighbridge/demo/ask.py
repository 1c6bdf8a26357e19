"""Ask a host for predictions as any client of the Open Inference Protocol would: HTTP and JSON."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np

from weighbridge.demo import digits

BATCH = 100


def accuracy(client: httpx.Client, url: str, model: str) -> float:
    """The share of held-out digits that the model on the host at `url` reads rightly."""
    _, _, held_out = digits.load()
    right = 0
    for start in range(0, len(held_out.labels), BATCH):
        pixels = held_out.pixels[start : start + BATCH]
        logits = np.array(_infer(client, url, model, pixels), dtype=np.float32).reshape(len(pixels), 10)
        right += int((logits.argmax(1) == held_out.labels[start : start + BATCH]).sum())
    return right / len(held_out.labels)


def serving(client: httpx.Client, url: str, model: str) -> tuple[str, str]:
    """The variant that the host says it serves, and the digest of its artifact."""
    answer = client.get(f"{url.rstrip('/')}/v2/models/{model}")
    answer.raise_for_status()
    said = answer.json()["parameters"]
    return str(said["variant"]), str(said["artifact"])


def _infer(client: httpx.Client, url: str, model: str, pixels: Any) -> list[float]:
    tensor = {"name": digits.INPUT, "datatype": "FP32", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    answer = client.post(f"{url.rstrip('/')}/v2/models/{model}/infer", json={"inputs": [tensor]})
    answer.raise_for_status()
    (output,) = answer.json()["outputs"]
    data: list[float] = output["data"]
    return data
