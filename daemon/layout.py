"""Which checkpoint of which model an object of the watched bucket belongs to, by its key alone."""

from __future__ import annotations

from dataclasses import dataclass

from weighbridge.storage import names
from weighbridge.storage.errors import InvalidName


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
            return Group("", key) if names.is_candidate(key) else None
        model, name = _model(parts[0]), parts[1]
        if len(parts) > 2:
            return Group(model, f"{self.prefix}{parts[0]}/{name}/")
        if name in (names.RECIPE, names.EVAL, names.TRAIN):
            return Wishes(model)
        return Group(model, key) if names.is_candidate(key) else None

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

    def folder(self, model: str) -> str:
        """A model's folder, ending in `/`: its checkpoints lie there, and beside them what judges them."""
        return f"{self.prefix}{model}/"


def _model(part: str) -> str:
    """The model's name, cut where it is too long to be one: the rest would not fit into a row that says so."""
    return part if len(part) <= _LONGEST else f"{part[:_LONGEST]}…"


_LONGEST = 200
"""Characters; one more is against the rule."""
