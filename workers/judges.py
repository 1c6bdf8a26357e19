"""What judges a model's checkpoints, as it lies beside them now: the recipe and both sets. Reads a store, knows no SQL.

Whoever can read the store looks: the daemon when it records a version, a worker when one is judged anew.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from weighbridge import limits
from weighbridge.registry import recipe
from weighbridge.registry.errors import InvalidRecipe
from weighbridge.registry.judging import Judges
from weighbridge.storage import names
from weighbridge.storage.errors import InvalidKey, ObjectNotFound, PreconditionFailed, StorageError
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import OpenWriter, Ref, Store
from weighbridge.storage.safetensors_header import MalformedHeader, ShortFile, read_header

MAX_RECIPE = 4 * limits.RECIPE
"""Bytes of a recipe that are read: what its characters may take at the most."""


class Unfit(StorageError):
    """What would judge is being written, or is wrong; the message names the file and the fault.

    With `needs_person` it stays so until somebody mends it.
    """

    def __init__(self, reason: str, needs_person: bool = False) -> None:
        super().__init__(reason)
        self.needs_person = needs_person


def beside(store: Store, folders: Sequence[str]) -> Judges:
    """Read what judges the checkpoints of a model whose folder has one of these names (`folders_of`). Raises Unfit."""
    return Judges(
        _recipe(store, [folder + name for folder in folders for name in names.RECIPES]),
        _dataset(store, [folder + names.EVAL for folder in folders], "evaluation"),
        _dataset(store, [folder + names.TRAIN for folder in folders], "training"),
    )


def folders_of(path: str, model: str) -> tuple[str, ...]:
    """The folders where a model's recipe and sets may lie, by the path of one of its checkpoints, in every spelling."""
    folder, slash, _ = path.removesuffix("/").rpartition("/")
    above, between, own = folder.rpartition("/")
    if not slash:
        return ("",)
    spelled = (own, model, unicodedata.normalize("NFD", model))
    return tuple(f"{above}{between}{name}/" for name in dict.fromkeys(spelled))


def _recipe(store: Store, keys: Sequence[str]) -> str | None:
    found = _only(store, keys)
    if found is None:
        return None
    if found.size > MAX_RECIPE:
        raise Unfit(f"{found.key} has {found.size:,} bytes; a recipe has at most {MAX_RECIPE:,}", needs_person=True)
    try:
        text = store.get(found.key, if_match=found)
    except (ObjectNotFound, PreconditionFailed) as error:
        raise Unfit(f"{found.key} changed while it was read") from error
    if (wrong := _wrong(text, found.key)) is not None:
        raise Unfit(f"the recipe is invalid: {wrong}", needs_person=True)
    return text.decode()


@lru_cache(maxsize=32)
def _wrong(text: bytes, name: str) -> str | None:
    """What is wrong with a recipe. Remembered: every look at each of a model's checkpoints asks."""
    try:
        recipe.parse(text, name=name)
    except InvalidRecipe as error:
        return str(error)
    return None


def _dataset(store: Store, keys: Sequence[str], which: str) -> Ref | None:
    found = _only(store, keys)
    if found is None:
        return None
    try:
        read_header(store, found)
    except (ShortFile, MalformedHeader) as error:
        raise Unfit(f"the {which} set is not whole: {error}", isinstance(error, MalformedHeader)) from error
    except (ObjectNotFound, PreconditionFailed) as error:
        raise Unfit(f"{found.key} changed while it was read") from error
    return found


def _only(store: Store, keys: Sequence[str]) -> Ref | None:
    """The one of these files that is there. Raises Unfit where there are two: which of them is meant is not guessed."""
    there = [found for key in keys if (found := _settled(store, key)) is not None]
    if len(there) > 1:
        raise Unfit(f"{there[0].key} and {there[1].key} are both there: keep the one that is meant", True)
    return there[0] if there else None


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
