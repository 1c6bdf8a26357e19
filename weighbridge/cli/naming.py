"""Whether a model that a command names is one: to the registry a filter by any other name is an empty answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weighbridge.registry.client import Client


def prove_known(client: Client, model: str) -> None:
    """Raise NotFound unless there is such a model, or something in the bucket that may become its first version."""
    if next(client.checkpoints(model), None) is None:
        client.model(model)


def is_known(client: Client, model: str) -> bool:
    """Whether there is such a model, or something that may become its first version."""
    from weighbridge.registry.errors import NotFound

    try:
        prove_known(client, model)
    except NotFound:
        return False
    return True
