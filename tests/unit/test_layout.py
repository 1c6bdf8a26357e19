"""Which checkpoint a key belongs to."""

from __future__ import annotations

import pytest

from weighbridge.daemon.layout import Group, Layout, Wishes

LAYOUT = Layout.of("", ".weighbridge")
UNDER = Layout.of("/team/drops/", "team/artifacts")


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("digits/a.safetensors", Group("digits", "digits/a.safetensors")),
        ("digits/a.pt", Group("digits", "digits/a.pt")),
        ("digits/run-1/model.safetensors", Group("digits", "digits/run-1/")),
        ("digits/run-1/README.md", Group("digits", "digits/run-1/")),
        ("digits/run-1/deep/er/x", Group("digits", "digits/run-1/")),
        ("digits/run-1/.metadata", Group("digits", "digits/run-1/")),
        ("digits/run-1/recipe.yaml", Group("digits", "digits/run-1/")),
        ("digits/run-1/weighbridge.json", Group("digits", "digits/run-1/")),
        ("digits/recipe.yaml", Wishes("digits")),
        ("digits/eval.safetensors", Wishes("digits")),
        ("digits/golden.safetensors", Group("digits", "digits/golden.safetensors")),
        ("digits/weighbridge.json", Group("digits", "digits/weighbridge.json")),
        ("digits/README.md", None),
        ("digits/a.safetensors.tmp", None),
        ("digits/optimizer.pt", None),
        ("digits/.a.safetensors", None),
        (".git/a/b.safetensors", None),
        ("digits/.cache/b.safetensors", None),
        (".weighbridge/blobs/ab/abcd", None),
        ("recipe.yaml", Group("", "recipe.yaml")),
        ("notes.txt", None),
        ("a.safetensors", Group("", "a.safetensors")),
    ],
)
def test_a_key_says_where_it_belongs(key: str, place: object) -> None:
    """Single objects, folders, what judges a model, and what is none of our business."""
    assert LAYOUT.place(key) == place


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("team/drops/m/a.safetensors", Group("m", "team/drops/m/a.safetensors")),
        ("team/drops/m/run/x.bin", Group("m", "team/drops/m/run/")),
        ("team/drops/m/recipe.yaml", Wishes("m")),
        ("team/artifacts/m/a.safetensors", None),
        ("other/m/a.safetensors", None),
        ("team/dropsy/m/a.safetensors", None),
    ],
)
def test_only_keys_below_the_prefix_count(key: str, place: object) -> None:
    """A neighbour whose name begins alike is outside; the artifacts are never watched."""
    assert UNDER.place(key) == place


@pytest.mark.parametrize(
    ("prefix", "scope"),
    [
        ("", ""),
        ("digits/", "digits/"),
        ("digits/run-1/", Group("digits", "digits/run-1/")),
        ("digits/run-1/deep/", Group("digits", "digits/run-1/")),
        (".weighbridge/", None),
        (".weighbridge/blobs/ab/", None),
        ("digits/.hidden/", None),
    ],
)
def test_a_rescan_of_a_folder_is_one_look_a_listing_or_nothing(prefix: str, scope: object) -> None:
    """What a source means by "look below here"."""
    assert LAYOUT.scope(prefix) == scope


def test_a_rescan_above_the_prefix_lists_the_prefix() -> None:
    """Of a folder that holds the watched one, only the watched one is listed."""
    assert UNDER.scope("team/") == "team/drops/"
    assert UNDER.scope("other/") is None


@pytest.mark.parametrize(
    ("group", "rule"),
    [
        (Group("a:b", "a:b/x.safetensors"), "':'"),
        (Group(" a", " a/x.safetensors"), "space"),
        (Group("m", "m/ run/"), "space"),
        (Group("", "x.safetensors"), "beside the models"),
    ],
)
def test_a_bad_name_is_named_with_its_rule(group: Group, rule: str) -> None:
    """What can never be a checkpoint where it lies says why."""
    assert rule in (group.fault or "")


def test_good_names_have_no_fault() -> None:
    """Also a folder that is marked unfinished: it waits to be renamed, and is not refused."""
    for group in (Group("m", "m/x.safetensors"), Group("m", "m/run/"), Group("m", "m/run.tmp/")):
        assert group.fault is None


def test_a_model_name_too_long_for_a_row_is_cut_and_refused() -> None:
    """The row can be written, and says why."""
    place = LAYOUT.place(f"{'x' * 900}/a.safetensors")
    assert isinstance(place, Group)
    assert len(place.model) < 255
    assert "longer" in (place.fault or "")
