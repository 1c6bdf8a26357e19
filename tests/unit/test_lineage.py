"""What publishers and files say of a checkpoint: bounded, marked where it was cut, and text for every database."""

from __future__ import annotations

import json

import pytest

from weighbridge import limits
from weighbridge.storage import lineage


def test_what_fits_is_kept_as_it_is() -> None:
    """In its order, with whatever characters."""
    said = {"b": "ü\n<b>", "a": ""}
    assert list(lineage.bounded(said).items()) == list(said.items())


@pytest.mark.parametrize(
    "said",
    [
        {"note": "x" * 10_000_000},
        {"n" * 10_000_000: "x"},
        {f"name {number}": "x" for number in range(100_000)},
        {f"name {number}": "x" * limits.METADATA_VALUE for number in range(1000)},
    ],
    ids=["a long text", "a long name", "many", "many long texts"],
)
def test_what_is_too_much_is_cut(said: dict[str, str]) -> None:
    """Names, texts, their number and all together have a limit; what was cut says so."""
    kept = lineage.bounded(said)
    assert 0 < len(kept) <= limits.METADATA
    assert all(0 < len(name) <= limits.NAME and len(text) <= limits.METADATA_VALUE for name, text in kept.items())
    assert sum(len(name) + len(text) for name, text in kept.items()) <= limits.METADATA_TEXT
    if len(said) == 1:
        [(name, text)] = kept.items()
        assert (name + text).endswith("cut)x" if len(text) == 1 else "cut)")


def test_what_no_database_takes_for_text_is_replaced() -> None:
    """NUL, and halves of characters as JSON can spell them."""
    said = json.loads('{"a\\u0000": "\\ud800b", "": "no name", " ": "none either"}')
    assert lineage.bounded(said) == {"a\ufffd": "\ufffdb"}
    json.dumps(lineage.bounded(said)).encode()


def test_shards_that_say_the_same_say_it_once() -> None:
    """What one says otherwise bears the file's name."""
    said = [(f"model-{number}.safetensors", {"format": "pt", "step": str(number // 2)}) for number in range(3)]
    assert lineage.of_files(said) == {"format": "pt", "step": "0", "model-2.safetensors: step": "1"}
    assert len(lineage.of_files((str(n), {str(n): "x"}) for n in range(10_000))) <= limits.METADATA


def test_what_a_publisher_may_say_is_kept_whole() -> None:
    """The limits of both are the same: nothing is cut of what was accepted."""
    said = {f"{number:0{limits.NAME}d}": "ü" * 200 for number in range(60)}
    assert lineage.bounded(lineage.check(said, "metadata")) == said
