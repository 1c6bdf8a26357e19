"""What judges a model's checkpoints, as it lies beside them now: the recipe and both sets. Reads a store, knows no SQL.

Whoever can read the store looks: the daemon when it records a version, a worker when one is judged anew.
"""

from __future__ import annotations

from weighbridge.registry import recipe
from weighbridge.registry.errors import InvalidRecipe
from weighbridge.registry.judging import Judges
from weighbridge.storage import names
from weighbridge.storage.errors import InvalidKey, ObjectNotFound, PreconditionFailed, StorageError
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import OpenWriter, Ref, Store
from weighbridge.storage.safetensors_header import MalformedHeader, ShortFile, read_header

MAX_RECIPE = 1 << 20
"""Bytes of a recipe that are read."""


class Unfit(StorageError):
    """What would judge is being written, or is wrong; the message names the file and the fault."""


def beside(store: Store, folder: str) -> Judges:
    """Read what judges the checkpoints of the model whose folder this is (it ends in `/`). Raises Unfit."""
    return Judges(
        _recipe(store, folder + names.RECIPE),
        _dataset(store, folder + names.EVAL, "evaluation"),
        _dataset(store, folder + names.TRAIN, "training"),
    )


def folder_of(path: str) -> str:
    """The model's folder, from the path of one of its checkpoints."""
    folder, slash, _ = path.removesuffix("/").rpartition("/")
    return folder + slash


def _recipe(store: Store, key: str) -> str | None:
    found = _settled(store, key)
    if found is None:
        return None
    if found.size > MAX_RECIPE:
        raise Unfit(f"{key} has {found.size:,} bytes; a recipe has at most {MAX_RECIPE:,}")
    try:
        text = store.get(key, if_match=found)
        recipe.parse(text, name=key)
        return text.decode()
    except InvalidRecipe as error:
        raise Unfit(f"the recipe is invalid: {error}") from error
    except (ObjectNotFound, PreconditionFailed) as error:
        raise Unfit(f"{key} changed while it was read") from error


def _dataset(store: Store, key: str, which: str) -> Ref | None:
    found = _settled(store, key)
    if found is None:
        return None
    try:
        read_header(store, found)
    except (ShortFile, MalformedHeader) as error:
        raise Unfit(f"the {which} set is not whole: {error}") from error
    except (ObjectNotFound, PreconditionFailed) as error:
        raise Unfit(f"{key} changed while it was read") from error
    return found


def _settled(store: Store, key: str) -> Ref | None:
    """Pin a file that judges, if there is one. Raises Unfit while somebody writes it."""
    try:
        found = pin(store.head(key))
        if isinstance(store, OpenWriter) and store.has_writer(key):
            raise Unfit(f"{key} is still open for writing")
    except ObjectNotFound:
        return None
    except InvalidKey as error:
        raise Unfit(str(error)) from error
    return found
