"""The stage *compress*: what it accepts, refuses and stores, whatever the method says of itself."""

from __future__ import annotations

import importlib
import shutil
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import compression
from safetensors.numpy import save
from safetensors.torch import load_file, save_file

from weighbridge.engines import golden
from weighbridge.engines.load import load
from weighbridge.engines.manifest import ArtifactFile, Manifest
from weighbridge.registry.lifecycle import Verdict
from weighbridge.registry.recipe import Method, VariantWish
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import StorageUnavailable
from weighbridge.workers import compress as stage
from weighbridge.workers.compress import METHODS, CompressTask, assemble, compress
from weighbridge.workers.compression import casting, data, report
from weighbridge.workers.compression.types import BuildFailed, Built, Order, Original
from weighbridge.workers.outcome import Outcome


class Shop:
    """One original in a folder of blobs, and the stage on it."""

    def __init__(self, folder: Path, original: Original) -> None:
        self.folder, self.original, self.blobs = folder, original, compression.blobs_in(folder)

    def task(self, method: str = "bf16", **wish: Any) -> CompressTask:
        return CompressTask(self.original.manifest.digest, VariantWish.model_validate({"method": method} | wish))

    def run(self, task: CompressTask | None = None, **changes: Any) -> Outcome:
        given: dict[str, Any] = {"blobs": self.blobs, "cache": self.original.cache, "scratch": self.folder / "scratch"}
        return compress(task or self.task(), **given | changes)

    def manifest(self, outcome: Outcome) -> Manifest:
        return Manifest.model_validate_json(self.blobs.get(outcome.facts["artifact_digest"]))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    return Shop(folder, compression.original_artifact(folder, compression.mlp(), compression.PIXELS))


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Order], Built]], None]:
    """Put a method of the test's own in the place of `bf16`."""

    def put(build: Callable[[Order], Built]) -> None:
        monkeypatch.setattr(casting, "build", build)

    return put


def test_every_method_of_a_recipe_has_its_module() -> None:
    """A method that a recipe may ask for is never unknown to a worker."""
    assert METHODS.keys() == set(typing.get_args(Method))
    for where in set(METHODS.values()):
        module, _, function = where.partition(":")
        assert callable(getattr(importlib.import_module(f"weighbridge.workers.compression.{module}"), function))


def test_a_variant_becomes_an_artifact_that_hosts_load(shop: Shop) -> None:
    """Every blob of it is stored, its golden matches, and the facts say sizes, tensors and what stayed."""
    outcome = shop.run(shop.task("int8-weight-only", skip=["4"]))
    assert outcome.verdict is Verdict.PASSED, outcome.reason
    manifest, facts = shop.manifest(outcome), outcome.facts
    assert manifest.variant == "int8-weight-only"
    assert [file.path for file in manifest.files] == ["model.safetensors"]
    assert manifest.inputs == shop.original.manifest.inputs
    assert facts["blobs"].keys() == manifest.blobs().keys() | {manifest.digest}
    assert all(shop.blobs.exists(digest) for digest in facts["blobs"])
    assert facts["size"] == manifest.files[0].size < facts["original_size"] == shop.original.manifest.files[0].size
    assert facts["ratio"] == pytest.approx(facts["size"] / facts["original_size"], abs=1e-5)
    assert facts["kept_layers"] == ["4.weight: skipped by 4"]
    assert {row["name"] for row in facts["tensors"]} == shop.original.manifest.binding.keys()
    session = load(manifest, shop.original.cache)
    golden.check(session, shop.blobs.get(manifest.golden.digest), *manifest.golden.tolerance)
    assert not any((shop.folder / "scratch").iterdir())


def test_the_same_wish_gives_the_same_artifact(shop: Shop) -> None:
    """A stage that runs twice, because a worker died, leaves one artifact."""
    assert shop.run(shop.task("int4-weight-only")).facts == shop.run(shop.task("int4-weight-only")).facts


def test_what_does_not_apply_is_said_with_the_layer(shop: Shop) -> None:
    """The variant is not applicable; its siblings go on."""
    outcome = shop.run(shop.task("int4-weight-only", group=48))
    assert outcome.verdict is Verdict.NOT_APPLICABLE
    assert "0: 64 columns do not divide into groups of 48" in outcome.reason


def test_a_missed_ratio_fails_with_the_numbers_and_the_layers(shop: Shop) -> None:
    """A variant that is larger than the recipe allows is not stored, and its report says why it is large."""
    outcome = shop.run(shop.task("int8-weight-only", name="small", skip=["2"], max_ratio=0.3))
    assert outcome.verdict is Verdict.REJECTED
    assert "max_ratio allows 0.300; kept: 2.weight: skipped by 2" in outcome.reason
    assert "artifact_digest" not in outcome.facts
    assert len(outcome.facts["tensors"]) == 6


def _copy(order: Order, **changes: Any) -> Built:
    """The original under another name."""
    (file,) = order.original.manifest.files
    path = order.folder / "model.safetensors"
    shutil.copy(order.original.cache(file.digest), path)
    rows = [report.kept(name, value) for name, value in sorted(load_file(path).items())]
    built = Built({"model.safetensors": path}, tuple(rows), casting.ENGINE)
    return replace(built, **{name: make(built) for name, make in changes.items()})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "nothing changed; kept: 0.weight: no linear layer's weight"),
        ({"tensors": lambda its: its.tensors[1:]}, "says nothing of 0.bias"),
        (
            {"tensors": lambda its: [row.model_copy(update={"action": "quantized"}) for row in its.tensors]},
            "the original's, byte for byte",
        ),
    ],
)
def test_a_silent_no_op_is_refused(shop: Shop, method: Any, changes: dict[str, Any], said: str) -> None:
    """A method that changed nothing, or does not say what became of a tensor, builds no variant."""
    method(lambda order: _copy(order, **changes))
    outcome = shop.run()
    assert outcome.verdict is Verdict.REJECTED
    assert said in outcome.reason


def test_less_than_the_method_promised_is_refused(shop: Shop, method: Any) -> None:
    """It said a quarter, and wrote a half."""
    true = casting.build
    method(lambda order: replace(true(order), promised_ratio=0.25))
    outcome = shop.run()
    assert outcome.verdict is Verdict.REJECTED
    assert "bytes are a ratio of 0.50" in outcome.reason
    assert "the method promises 0.3" in outcome.reason


def test_files_that_do_not_load_are_refused(shop: Shop, method: Any) -> None:
    """A variant must run where it was built, before any host gets it."""
    true = casting.build

    def broken(order: Order) -> Built:
        built = true(order)
        weights = load_file(built.files["model.safetensors"])
        del weights["4.bias"]
        save_file(weights, built.files["model.safetensors"])
        return built

    method(broken)
    outcome = shop.run()
    assert outcome.verdict is Verdict.REJECTED
    assert "missing 4.bias" in outcome.reason


def _hungry(rows: int) -> Callable[[Order], Built]:
    true = casting.build

    def build(order: Order) -> Built:
        for batch in order.data.batches(64, 32):
            if len(batch["pixels"]) > rows:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] not enough memory: you tried to allocate 1 B")
        return true(order)

    return build


def test_out_of_memory_lowers_the_batch_and_says_so(shop: Shop, method: Any) -> None:
    """32 rows do not fit, 16 neither, 8 do."""
    method(_hungry(8))
    outcome = shop.run()
    assert outcome.verdict is Verdict.PASSED, outcome.reason
    assert outcome.facts["notes"] == ["batch lowered to 8: out of memory"]


def test_out_of_memory_with_one_row_is_an_end(shop: Shop, method: Any) -> None:
    """There is nothing left to lower: rejected, not tried for ever."""
    method(_hungry(0))
    outcome = shop.run()
    assert outcome.verdict is Verdict.REJECTED
    assert "out of memory with one row at a time" in outcome.reason


def test_only_what_a_retry_cures_is_raised(shop: Shop, method: Any) -> None:
    """A library's own error is a verdict; a store that is away is tried again."""

    def unavailable(digest: str) -> Path:
        raise StorageUnavailable("the store is away")

    def strange(order: Order) -> Built:
        raise KeyError("surprise")

    with pytest.raises(StorageUnavailable):
        shop.run(cache=unavailable)
    method(strange)
    outcome = shop.run()
    assert outcome.verdict is Verdict.REJECTED
    assert "KeyError: 'surprise'" in outcome.reason


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """The same original in two files."""
    folder = tmp_path_factory.mktemp("sharded")
    whole = compression.original_artifact(folder, compression.mlp(), compression.PIXELS)
    blobs, weights = compression.blobs_in(folder), load_file(whole.cache(whole.manifest.files[0].digest))
    files = []
    for number, names in enumerate((["0.weight", "0.bias", "4.weight"], ["2.weight", "2.bias", "4.bias"]), 1):
        blob = blobs.put_bytes(save({name: weights[name].numpy() for name in names}))
        path = f"model-0000{number}-of-00002.safetensors"
        files.append(ArtifactFile(path=path, size=blob.size, digest=blob.digest))
    manifest = whole.manifest.model_copy(update={"files": tuple(files)})
    blobs.put_bytes(manifest.canonical())
    return Shop(folder, replace(whole, manifest=manifest))


def test_shards_built_apart_are_the_variant_built_whole(sharded: Shop) -> None:
    """Two workers with a file each, and one that joins them, end with what one worker makes alone."""
    task = replace(sharded.task("int8-rows"), shards=2)
    outcomes = [sharded.run(replace(task, part=part)) for part in ("0", "1")]
    assert [outcome.verdict for outcome in outcomes] == [Verdict.PASSED, Verdict.PASSED], outcomes
    parts = [outcome.facts["shard"] for outcome in outcomes]
    scratch = sharded.folder / "scratch"
    given: dict[str, Any] = {"blobs": sharded.blobs, "cache": sharded.original.cache, "scratch": scratch}
    joined = assemble(task, parts, **given)
    assert joined.verdict is Verdict.PASSED, joined.reason
    assert joined.facts == sharded.run(sharded.task("int8-rows")).facts
    assert len(sharded.manifest(joined).files) == 2
    lacking = assemble(task, parts[:1], **given)
    assert lacking.verdict is Verdict.REJECTED
    assert "says nothing of 2.bias" in lacking.reason
    assert "two shards hold" in assemble(task, [*parts, parts[0]], **given).reason


def test_a_method_that_has_no_shards_says_so(sharded: Shop) -> None:
    """Not a quiet build of the whole in each shard."""
    outcome = sharded.run(replace(sharded.task("bf16"), part="1", shards=2))
    assert outcome.verdict is Verdict.NOT_APPLICABLE
    assert "bf16 cannot be built by shards" in outcome.reason


def _set(blobs: Blobs, rows: int = 5, **changes: Any) -> str:
    pixels = np.arange(rows * 64, dtype=np.float32).reshape(rows, 64)
    return blobs.put_bytes(save({"pixels": pixels, "labels": np.arange(rows)} | changes)).digest


def _open(shop: Shop, **sets: str | None) -> Any:
    given = {"train": None, "dataset": None} | sets
    return data.open_data(shop.original.manifest.inputs, cache=shop.original.cache, **given)


def test_data_is_the_best_there_is(shop: Shop) -> None:
    """The training set with labels; else the evaluation set without them, which would leak; else random inputs."""
    found = _set(shop.blobs)
    train, evaluation, random = _open(shop, train=found, dataset=found), _open(shop, dataset=found), _open(shop)
    assert [one.origin for one in (train, evaluation, random)] == ["train", "eval", "synthetic"]
    assert [one.labelled for one in (train, evaluation, random)] == [True, False, False]
    batches: Iterator[Any] = train.batches(12, 4)
    seen = list(batches)
    assert [len(batch["pixels"]) for batch in seen] == [4, 4, 4]
    labels = np.concatenate([batch["labels"] for batch in seen])
    assert sorted(labels[:5]) == [0, 1, 2, 3, 4]
    assert all((batch["pixels"][:, 0] == batch["labels"] * 64).all() for batch in seen)
    assert all(batch.keys() == {"pixels"} for batch in evaluation.batches(3, 2))
    assert [batch["pixels"].shape for batch in random.batches(3, 2)] == [(2, 64), (1, 64)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pixels": np.zeros((5, 63), np.float32)}, r"pixels is float32\[5, 63\], the program takes FP32\[-1, 64\]"),
        ({"labels": np.arange(4)}, "one row an example"),
        ({"pixels": np.zeros((5, 64), np.float16)}, r"float16\[5, 64\]"),
    ],
)
def test_a_training_set_that_does_not_fit_is_named(shop: Shop, changes: dict[str, Any], said: str) -> None:
    """With the tensor and both shapes."""
    with pytest.raises(BuildFailed, match=said):
        list(_open(shop, train=_set(shop.blobs, **changes)).batches(4, 2))


def test_the_command_line_prints_the_report(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone on a machine, without a registry: a table, and the new artifact's digest."""
    code = stage.main([shop.original.manifest.digest, "--method", "int8-weight-only", "--blobs", str(shop.folder)])
    said = capsys.readouterr().out
    assert code == 0
    assert "0.weight" in said
    assert said.splitlines()[-1] == shop.run(shop.task("int8-weight-only")).facts["artifact_digest"]
