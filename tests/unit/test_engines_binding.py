"""Names, fingerprints, bindings and datatypes: all without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weighbridge.engines import datatypes
from weighbridge.engines.binding import Parameter, bind, fingerprint, matches, normal_name
from weighbridge.engines.errors import BindingError, LoadError
from weighbridge.engines.factory import load_factory

W, B = Parameter(shape=(4, 2), dtype="F32"), Parameter(shape=(4,), dtype="F32")
PROGRAM = {"fc.weight": W, "fc.bias": B}


@given(st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=3), st.integers(0, 2))
def test_wrappers_vanish_wherever_they_stand(wrappers: list[str], at: int) -> None:
    """DDP and torch.compile may wrap the model or a part of it, in any order."""
    parts = ["encoder", "fc"]
    name = ".".join([*parts[:at], *wrappers, *parts[at:], "weight"])
    assert normal_name(name) == "encoder.fc.weight"


def test_a_fingerprint_ignores_order_and_wrappers_only() -> None:
    """Shape and dtype count; order and prefixes do not."""
    same = {"module.fc.bias": B, "module.fc.weight": W}
    assert fingerprint(same) == fingerprint(PROGRAM)
    assert bind(same, PROGRAM) == {"module.fc.bias": "fc.bias", "module.fc.weight": "fc.weight"}
    assert fingerprint(PROGRAM | {"fc.bias": B.model_copy(update={"dtype": "BF16"})}) != fingerprint(PROGRAM)


def test_names_that_differ_are_named() -> None:
    """Missing, unexpected and mismatched names are data and message."""
    tensors = {"fc.weight": Parameter(shape=(2, 4), dtype="F32"), "extra": B}
    with pytest.raises(BindingError, match=r"fc.weight is F32\[2, 4\], not F32\[4, 2\]") as caught:
        bind(tensors, PROGRAM)
    error = caught.value
    assert (error.missing, error.unexpected, error.mismatched) == (["fc.bias"], ["extra"], ["fc.weight"])


def test_two_names_that_become_one_are_refused() -> None:
    """A checkpoint with both fc.weight and module.fc.weight has no single binding."""
    with pytest.raises(BindingError, match="one name without wrapper prefixes"):
        bind(PROGRAM | {"module.fc.weight": W}, PROGRAM)


def test_floats_may_be_cast_only_where_asked() -> None:
    """bf16 weights bind to a float32 program by name, never by fingerprint; integers never do."""
    half = {name: value.model_copy(update={"dtype": "BF16"}) for name, value in PROGRAM.items()}
    whole = {name: value.model_copy(update={"dtype": "I32"}) for name, value in PROGRAM.items()}
    assert not matches(half, PROGRAM)
    assert bind(half, PROGRAM, cast=True)
    with pytest.raises(BindingError):
        bind(whole, PROGRAM, cast=True)


def test_only_tied_parameters_may_be_absent() -> None:
    """One of a tied group is enough, whichever; none is not."""
    program = {"a": W, "b": W.model_copy(update={"tied": "a"}), "c": B}
    assert bind({"b": W, "c": B}, program) == {"b": "b", "c": "c"}
    with pytest.raises(BindingError, match="missing a, b"):
        bind({"c": B}, program)


@pytest.mark.parametrize("name", [name for name in datatypes.NAMES if name != "BYTES"])
def test_datatypes_round_trip(name: str) -> None:
    """Every datatype survives numpy, safetensors and torch."""
    assert datatypes.from_numpy(datatypes.to_numpy(name)) == name
    assert datatypes.from_safetensors(datatypes.to_safetensors(name)) == name
    assert datatypes.from_torch(datatypes.to_torch(name)) == name


def test_the_front_can_import_these_without_torch() -> None:
    """The serving front and the codec stay light."""
    modules = "datatypes, binding, tensors, golden, manifest, protocols, load, factory"
    code = f"import sys; from weighbridge.engines import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_factory_reference_says_what_is_wrong(tmp_path: Path) -> None:
    """No colon, no file, no such name, code that fails: each by its own words."""
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no weights today')\ndef f(): ...")
    good = tmp_path / "good.py"
    good.write_text("def f(): return 7")
    for reference, rule in (
        ("nothing", "write package.module:factory"),
        (f"{tmp_path}/none.py:f", "there is no file"),
        (f"{broken}:f", "RuntimeError: no weights today"),
        (f"{good}:g", "has no callable g"),
        ("no_such_package.x:f", "ModuleNotFoundError"),
    ):
        with pytest.raises(LoadError, match=rule):
            load_factory(reference)
    assert load_factory(f"{good}:f")() == 7  # type: ignore[comparison-overlap]
