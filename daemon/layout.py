"""Which checkpoint of which model an object of the watched bucket belongs to, by its key alone."""

from __future__ import annotations

from dataclasses import dataclass

from weighbridge.storage import names
from weighbridge.storage.errors import InvalidName
from weighbridge.storage.keys import is_valid


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """The objects of one checkpoint: everything under a `path` that ends in `/`, else the one object of that key."""

    model: str
    path: str

    @property
    def name(self) -> str:
        """The checkpoint's own name: the last part of its path."""
        return self.path.removesuffix("/").rpartition("/")[2]

    @property
    def folder(self) -> bool:
        return self.path.endswith("/")

    @property
    def fault(self) -> str | None:
        """Why this can never be a checkpoint where it lies; None when nothing is wrong with its place and names."""
        if not self.model:
            return "it lies beside the models' folders: put it into the folder of its model, <model>/<checkpoint>"
        if not self.folder and (misplaced := _MISPLACED.get(self.name)):
            return misplaced
        if not self.folder and self.name.endswith(names.INDEX):
            return "an index and its shards need a folder of their own: <model>/<checkpoint>/"
        try:
            names.check_model(self.model)
            if not names.is_unfinished(self.name):
                names.check_checkpoint(self.name)
        except InvalidName as error:
            return str(error)
        return None


@dataclass(frozen=True, slots=True, order=True)
class Wishes:
    """A file that every later checkpoint of a model is judged by: its recipe, its evaluation or its training set."""

    model: str


Place = Group | Wishes


@dataclass(frozen=True, slots=True)
class Layout:
    """The bucket's layout below `prefix`; `artifacts` is where Weighbridge writes. Both end in `/` or are empty.

    An empty `artifacts` means that artifacts lie in another store.
    """

    prefix: str = ""
    artifacts: str = ""

    @classmethod
    def of(cls, prefix: str, artifacts: str = "") -> Layout:
        """The same, from prefixes as people write them: with or without slashes around them."""
        return cls(*(f"{text.strip('/')}/" if text.strip("/") else "" for text in (prefix, artifacts)))

    def place(self, key: str) -> Place | None:
        """Say where an object belongs; None for what is none of our business (a README, dot-names, our artifacts)."""
        if not key.startswith(self.prefix) or (self.artifacts and key.startswith(self.artifacts)):
            return None
        parts = key[len(self.prefix) :].split("/", 2)
        # Deeper down a dot-name is a part of its checkpoint, as DCP's `.metadata`.
        if any(part.startswith(".") for part in parts[:2]):
            return None
        if len(parts) == 1:
            return Group("", key) if parts[0] in names.RESERVED or _concerns(parts[0]) else None
        model, name = _model(parts[0]), parts[1]
        if len(parts) > 2:
            return Group(model, f"{self.prefix}{parts[0]}/{name}/")
        if name in (*names.RECIPES, names.EVAL, names.TRAIN):
            return Wishes(model)
        return Group(model, key) if name in _MISPLACED or _concerns(name) else None

    def passed(self, key: str) -> Group | None:
        """Say whose row tells that a listing passed over `key`: its checkpoint's, else one of its own, or nobody's."""
        if self.artifacts and key.startswith(self.artifacts):
            return None
        if not key.startswith(self.prefix):
            return Group("", key) if self.prefix.startswith(key) else None
        parts = key[len(self.prefix) :].split("/")
        if any(part.startswith(".") for part in parts[:2]):
            return None
        folder, valid = key.endswith("/"), is_valid(key.removesuffix("/"))
        place = self.place(f"{key}x" if folder else key) if valid else None
        if isinstance(place, Wishes):
            return None  # Whoever looks at a checkpoint of this model finds it, and says so.
        if isinstance(place, Group):
            return place
        return Group(_model(parts[0]) if len(parts) > 1 else "", key) if folder or _concerns(parts[-1]) else None

    def model_of(self, prefix: str) -> str | None:
        """The only model whose checkpoints lie below the prefix; None where there may be several."""
        name, slash, _ = prefix[len(self.prefix) :].partition("/")
        return _model(name) if slash else None

    def holds(self, group: Group) -> bool:
        """Say whether objects at the group's path are a checkpoint; else only what was passed over has this path."""
        return is_valid(group.path.removesuffix("/")) and self.place(group.path + "x" * group.folder) == group

    def scope(self, prefix: str) -> Group | str | None:
        """Say what "look below this prefix" means: the one checkpoint it lies in, a prefix to list, or nothing of ours.

        `prefix` is empty or a folder's, ending in `/`.
        """
        if self.prefix.startswith(prefix):
            return self.prefix
        place = self.place(f"{prefix}x")
        if isinstance(place, Group) and place.folder:
            return place
        return prefix if self.place(f"{prefix}x{names.SAFETENSORS}") else None


def _concerns(name: str) -> bool:
    """Say whether a single object is a checkpoint, or would be under its right name, or in its right place."""
    return names.is_candidate(name) or names.meant(name) is not None or name.endswith(names.INDEX)


def _model(part: str) -> str:
    """The model's name, cut where it is too long to be one: the rest would not fit into a row that says so."""
    name = names.composed(part)
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"


_LONGEST = 200
"""Characters; one more is against the rule."""
_MISPLACED = {
    names.GOLDEN: "a golden belongs to one checkpoint: put it into that one's folder, <model>/<checkpoint>/",
    names.PUBLISHED: "a checkpoint's manifest lies in the checkpoint's folder: <model>/<checkpoint>/",
}
