"""Names with a meaning in a watched bucket, and what a model or checkpoint may be called."""

from __future__ import annotations

import re
import unicodedata

from weighbridge.storage.errors import InvalidName
from weighbridge.storage.keys import TEMPORARY

RECIPE = "recipe.yaml"
RECIPES = (RECIPE, "recipe.yml")
"""The recipe's names: both are read, one of them may be there."""
EVAL = "eval.safetensors"
TRAIN = "train.safetensors"
GOLDEN = "golden.safetensors"
PUBLISHED = "weighbridge.json"
RESERVED = frozenset({*RECIPES, EVAL, TRAIN, GOLDEN, PUBLISHED})
"""Never checkpoints, wherever they lie."""

SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"

OTHER_WEIGHTS = frozenset(
    {".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pt2", ".pkl", ".pickle", ".h5", ".keras", ".gguf", ".npz", ".msgpack"}
    | {".distcp", ".tflite", ".pb", ".mar"}
)
"""Suffixes of weights in formats that are not supported yet."""

COMPANIONS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "tokenizer")
"""Starts of names of trainer state, which comes in formats of weights (`optimizer.pt`) without being any."""

UNFINISHED = (
    *(".tmp", ".temp", ".incomplete", ".part", ".partial", ".filepart", ".crdownload", ".opdownload", ".download"),
    *(".downloading", ".fdmdownload", ".xltd", ".aria2", ".aria2__temp", ".!ut", ".!qb", ".!bt", ".unconfirmed"),
    *(".gstmp", "._copying_", ".unfinished", "-unfinished", "-unfinished.txt"),
)
"""Ends of names, in lower case, that say that somebody is still writing, or fetching."""

BESIDE = (*UNFINISHED, "_.gstmp", ".st", ".bc!", ".td", "~")
"""The same for a name that is another's with this end: these say so only beside that other (`x.safetensors.st`)."""
_SPELLED = sorted({way for end in BESIDE for way in (end, end.upper(), end.title(), end[:2] + end[2:].title())})

_STAGED = re.compile(r"tmp-checkpoint-\d+|.*\.orbax-checkpoint-tmp(-\d+)?")
"""Whole names under which trainers write a folder before they rename it."""
_STEP = re.compile(r"(checkpoint|ckpt|global[-_]?step|step|iter|epoch)[-_=]?\d+.*", re.IGNORECASE)
"""Names of folders that trainers number: each is a checkpoint of its own."""
_ALMOST_RECIPES = ("recipe", "recipe.json", "recipe.toml", "recipe.txt", "recipe.yaml.txt", "recipe.yml.txt")
_ALMOST_SAFETENSORS = (SAFETENSORS, ".safetensor", ".safetensors.txt", ".safe_tensors", ".sft")


def is_reserved(name: str) -> bool:
    """Say whether the last part of a key is never a checkpoint: a reserved name, in any spelling, or a dot-name."""
    return name.casefold() in RESERVED or name.startswith(".")


def is_weights(key: str) -> bool:
    """Say whether a key is a safetensors file of weights: not the golden, not the evaluation set."""
    name = key.rsplit("/", 1)[-1]
    return name.endswith(SAFETENSORS) and not is_reserved(name)


def is_other_weights(key: str) -> bool:
    """Say whether a key is a file of weights in a format that is not supported yet."""
    name = key.rsplit("/", 1)[-1]
    return suffix(name) in OTHER_WEIGHTS and not is_reserved(name) and not name.startswith(COMPANIONS)


def is_shard(key: str) -> bool:
    """Say whether a name counts itself as one of several (`model-00001-of-00003.safetensors`)."""
    return re.search(r"-\d+-of-(?!0*1\.)\d+\.safetensors$", key) is not None


def is_candidate(key: str) -> bool:
    """Say whether a single object is a checkpoint, supported or not; a README beside the checkpoints is none."""
    return is_weights(key) or is_other_weights(key)


def meant(name: str) -> str | None:
    """The name that a file should have had to be read, where this is it in another spelling; None for all others."""
    folded = name.casefold()
    if name in RESERVED or name.startswith(".") or (name.endswith((SAFETENSORS, INDEX)) and folded not in RESERVED):
        return None
    if folded in RESERVED:
        return folded
    if folded in _ALMOST_RECIPES:
        return RECIPE
    if folded.endswith(INDEX):
        return name[: -len(INDEX)] + INDEX
    end = next((end for end in _ALMOST_SAFETENSORS if folded.endswith(end) and len(folded) > len(end)), None)
    return None if end is None else name[: -len(end)] + SAFETENSORS


def is_step(name: str) -> bool:
    """Say whether a folder's name is a trainer's, with a number: `checkpoint-500`, `global_step500`, `epoch=3`."""
    return _STEP.fullmatch(name) is not None


def is_adapter(key: str) -> bool:
    """Say whether a file of weights changes another model's and is none by itself (PEFT, LoRA)."""
    return key.rsplit("/", 1)[-1].startswith(("adapter_model", "pytorch_lora_weights", "adapters.safetensors"))


def is_hidden(path: str) -> bool:
    """Say whether any part of a path is a dot-name (`.cache/…`): no part of a checkpoint."""
    return any(part.startswith(".") for part in path.split("/"))


def is_unfinished(key: str) -> bool:
    """Say whether any part of a key carries a writer's mark (`x.tmp`, `run-1-unfinished/…`, `tmp-checkpoint-5/…`)."""
    return any(part.lower().endswith(UNFINISHED) or _STAGED.fullmatch(part) for part in key.split("/"))


def marks(name: str, other: str) -> bool:
    """Say whether a sibling's whole name marks `name` unfinished: `x.safetensors.aria2`, `x-unfinished`."""
    stem = name.removesuffix(SAFETENSORS)
    rest = other.removeprefix(name) if other.startswith(name) else ""
    return rest.lower() in BESIDE or other in (f"{stem}-unfinished", f"{stem}-unfinished.txt")


def marking(name: str) -> list[str]:
    """The names that mark `name` unfinished, in the spellings that tools write, for stores that are asked by name."""
    stem = name.removesuffix(SAFETENSORS)
    return [*(name + end for end in _SPELLED), f"{stem}-unfinished", f"{stem}-unfinished.txt"]


def suffix(name: str) -> str:
    """The last suffix in lower case, with its dot; empty where there is none."""
    stem, dot, last = name.rpartition(".")
    return f".{last.lower()}" if dot and stem else ""


def check_model(name: str) -> str:
    """Return a valid model name, NFC: not empty, no `/`, no `:`, one plain path part. Raises InvalidName."""
    if ":" in name:
        raise InvalidName(f"{name!r} is not a valid model name: it has a ':'")
    return _check_part(name, "model")


def check_checkpoint(name: str) -> str:
    """Return a valid name of a checkpoint, which is a folder's name. Raises InvalidName."""
    if is_unfinished(name):
        raise InvalidName(f"{name!r} is not a valid checkpoint name: the end marks unfinished files")
    return _check_part(name, "checkpoint")


def _check_part(name: str, what: str) -> str:
    wrong = (
        "it is empty" if not name.strip()
        else "it starts with a dot" if name.startswith((".", TEMPORARY))
        else "it has a '/', a backslash or a control character" if _has_forbidden(name)
        else "it begins or ends with a space" if name != name.strip()
        else "it is longer than 200 bytes" if len(name.encode("utf-8", "replace")) > 200
        else "it is reserved" if name in RESERVED
        else None
    )  # fmt: skip
    if wrong:
        raise InvalidName(f"{name!r} is not a valid {what} name: {wrong}")
    return composed(name)


def composed(name: str) -> str:
    """The one spelling of a name that may be written in several (NFC): `é` is one letter, not `e` and an accent."""
    return unicodedata.normalize("NFC", name)


def _has_forbidden(name: str) -> bool:
    return any(character in "/\\" or not character.isprintable() for character in name)
