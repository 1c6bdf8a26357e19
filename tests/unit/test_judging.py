"""Which versions lacked what lies beside them now."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from weighbridge.daemon.judging import Beside
from weighbridge.registry.judging import Judged, Judges, Need, need
from weighbridge.registry.lifecycle import VersionStatus
from weighbridge.registry.recipe import NO_POLICY
from weighbridge.storage.protocols import ObjectInfo, Ref
from weighbridge.workers import judges

V, N = VersionStatus, Need
SET, OTHER = Ref("m/eval.safetensors", 8, "one"), Ref("m/eval.safetensors", 8, "two")
THERE = Judges("lane: fast", SET)
NOW = THERE.revision(NO_POLICY)


@pytest.mark.parametrize(
    ("status", "recipe", "evaluation", "evaluated", "wanted"),
    [
        (V.NEEDS_BINDING, "old", None, None, N.ANEW),
        (V.NEEDS_BINDING, NOW, None, None, N.NOTHING),  # judged by it already: once
        (V.NEEDS_BINDING, None, None, None, N.NOTHING),  # its judgement begins, and looks then
        (V.REJECTED, NOW, None, False, N.ANEW),
        (V.REJECTED, NOW, None, None, N.ANEW),  # zeros at an end, and no set to tell what they mean
        (V.REJECTED, NOW, OTHER, False, N.ANEW),  # that set could not be read
        (V.REJECTED, "old", SET, False, N.ANEW),  # nor could the recipe be followed
        (V.REJECTED, "old", OTHER, True, N.NOTHING),  # a verdict was reached
        (V.REJECTED, NOW, SET, False, N.NOTHING),
        (V.READY, NOW, None, False, N.EVALUATION),
        (V.READY, "old", None, False, N.EVALUATION),
        (V.READY, "old", SET, True, N.NOTHING),
        (V.READY, NOW, OTHER, True, N.NOTHING),
        (V.READY, "old", SET, False, N.NOTHING),
        (V.DISCOVERED, "old", None, None, N.LATER),
        (V.DISCOVERED, NOW, SET, None, N.NOTHING),
        (V.QUARANTINED, "old", None, None, N.NOTHING),
        (V.ARCHIVED, "old", None, False, N.NOTHING),
        (V.DUPLICATE, "old", None, None, N.NOTHING),
        (V.SUPERSEDED, "old", None, None, N.NOTHING),
    ],
)
def test_need(
    status: VersionStatus, recipe: str | None, evaluation: Ref | None, evaluated: bool | None, wanted: Need
) -> None:
    """A program, or what quality is measured by; never what a verdict was reached on."""
    pinned = None if evaluation is None else asdict(evaluation)
    assert need(Judged(status, recipe, pinned, evaluated), THERE, NO_POLICY) is wanted


def test_no_set_is_nothing_that_anybody_lacked() -> None:
    """Also where a set was there and is gone."""
    for status in V:
        for pinned in (None, asdict(SET)):
            seen = Judged(status, Judges().revision(NO_POLICY), pinned, False)
            assert need(seen, Judges(), NO_POLICY) is N.NOTHING


def test_listings_tell_what_no_event_told() -> None:
    """What is new, other, or gone; what is as it was is not told again, nor what was not listed."""
    told: list[str] = []
    beside = Beside(told.append, lambda model: told.append(f"first {model}"))

    def listing(*seen: tuple[str, str], whole: bool = True) -> list[str]:
        told.clear()
        looking = beside.look()
        for model, etag in seen:
            looking.see(model, ObjectInfo(f"{model}/recipe.yaml", 1, etag, datetime(2026, 1, 1, tzinfo=UTC)))
        looking.end(whole=whole)
        return list(told)

    assert listing(("a", "1"), whole=False) == []
    assert listing(("a", "1"), ("b", "1")) == ["first a", "first b"]
    assert listing(("a", "1"), ("b", "1")) == []
    assert listing(("a", "2"), ("b", "1")) == ["a"]
    assert listing(("a", "2"), whole=False) == []
    assert listing(("a", "2")) == ["b"]
    assert listing(("a", "2"), ("b", "1")) == ["b"]


@pytest.mark.parametrize(
    ("path", "folders"),
    [("m/a.safetensors", ("m/",)), ("p/m/run/", ("p/m/",)), ("run/", ("",)), ("p/M/run/", ("p/M/", "p/m/"))],
)
def test_what_judges_a_checkpoint_lies_in_its_models_folder(path: str, folders: tuple[str, ...]) -> None:
    """Of a file and of a folder; a name may be spelled in several ways."""
    assert judges.folders_of(path, "m")[: len(folders)] == folders if path != "run/" else folders == ("",)
