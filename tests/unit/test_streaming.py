"""The streaming methods: error bounds, equality of kernels and of shards, what is kept, what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.fixtures.compression import PIXELS, mlp, order, original_artifact
from weighbridge.engines import packed
from weighbridge.engines.load import load
from weighbridge.engines.manifest import ArtifactFile
from weighbridge.registry.recipe import VariantWish
from weighbridge.registry.schemas import VariantTensor
from weighbridge.storage.streaming import digest_file
from weighbridge.workers.compression import command, kernels, report, streaming
from weighbridge.workers.compression.types import BuildFailed, NotApplicable, Original

METHODS = tuple(packed.SCHEMES)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def weights(folder: Path, tensors: Mapping[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / name)
    return folder / name


def pack(source: Path, out: Path, method: str, **wish: Any) -> dict[str, VariantTensor]:
    made = command.pack(source, out, VariantWish.model_validate({"method": method} | wish))
    return {row.name: row for row in made["tensors"]}  # type: ignore[attr-defined]


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    return packed.unpack({file.name: file for file in folder.iterdir()})


def spread(dtype: torch.dtype, shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from(list(DTYPES)),
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    group=st.sampled_from([4, 8, 32]),
    groups=st.integers(1, 6),
    scale=st.sampled_from([1e-6, 0.02, 1.0, 3e3]),
    seed=st.integers(0, 99),
)
def test_every_weight_comes_back_within_half_a_step(
    tmp_path_factory: pytest.TempPathFactory,
    method: str,
    dtype: str,
    shape: list[int],
    group: int,
    groups: int,
    scale: float,
    seed: int,
) -> None:
    """Integers: half of the scale that is stored. fp8: 1/16 of the weight. Then the original dtype's own rounding."""
    given_ = spread(DTYPES[dtype], (*shape, group * groups), seed, scale)
    folder = tmp_path_factory.mktemp("pack")
    source = weights(folder / "in", {"w": given_, "b": torch.ones(3), "anchor": torch.ones(64, 64)})
    row = pack(source, folder / "out", method, group=group)["w"]
    found, stored = unpacked(folder / "out")["w"], load_file(folder / "out" / "model.safetensors")
    if row.action == report.KEPT:
        assert torch.equal(found, given_)
        return
    place = packed.layout(packed.SCHEMES[method], group, dtype, tuple(given_.shape))
    step = stored["w.scale"].double().reshape(-1, 1)
    wanted, got = (value.double().reshape(place.rows, place.length) for value in (given_, found))
    rounding = wanted.abs() * torch.finfo(DTYPES[dtype]).eps + torch.finfo(DTYPES[dtype]).smallest_normal * 2**-9
    bound = wanted.abs() / 16 + step / 1024 if method == "fp8-tensors" else step / 2
    assert bool(((wanted - got).abs() <= bound * (1 + 1e-5) + rounding).all())
    assert stored["w"].nbytes + stored["w.scale"].nbytes == row.bytes_out
    assert row.sqnr == pytest.approx(report.sqnr(given_, found), abs=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_compiled_kernel_and_torch_write_the_same_bytes(method: str, dtype: str) -> None:
    """A worker without g++ makes the same artifact, only slower: also of zeros, subnormals, ties and extremes."""
    if kernels.pick(dtype)[1]:
        pytest.skip("there is no g++")
    torch_dtype, scheme, length = DTYPES[dtype], packed.SCHEMES[method], 64
    most = min(torch.finfo(torch_dtype).max, torch.finfo(torch.float32).max)
    wide = spread(torch.float64, (300, length), 1) * torch.logspace(-45, 4, 300, dtype=torch.float64)[:, None]
    source = wide.to(torch_dtype)
    source[0], source[1], source[2, 0] = 0, most, -most
    source[3] = torch.arange(length).to(torch_dtype) / 2  # ties
    source[3, 0] = scheme.top
    raw = source.view(torch.uint8).numpy().reshape(-1)
    made = []
    for kernel in (kernels.compiled(dtype), lambda *given: kernels.eager(dtype, *given)):
        codes, scales = np.zeros(300 * length * scheme.bits // 8, np.uint8), np.zeros(300 * 4, np.uint8)
        scales = scales[: 300 * (2 if scheme.grouped else 4)]
        sums = kernel(scheme, raw, 300, length, codes, scales)
        made.append((codes, scales, sums))
    assert np.array_equal(made[0][1], made[1][1])
    assert np.array_equal(made[0][0], made[1][0])
    assert made[0][2] == pytest.approx(made[1][2], rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("slow", [False, True])
def test_nan_and_inf_fail_naming_the_tensor(
    tmp_path: Path, value: float, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation refused them before; a method fails closed all the same, with either kernel."""
    if slow:
        monkeypatch.setenv("PATH", "")
        kernels.compiled.cache_clear()
    for dtype in DTYPES.values():
        bad = spread(dtype, (70, 64), 0)
        bad[69, 63] = value
        source = weights(tmp_path / str(dtype), {"fine": torch.ones(4, 64), "layer.bad": bad})
        with pytest.raises(BuildFailed, match=r"layer\.bad holds NaN or Inf"):
            pack(source, tmp_path / str(dtype) / "out", "int8-rows")
    kernels.compiled.cache_clear()


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant's notes carry why the build was slow."""
    monkeypatch.setenv("PATH", "")
    kernels.compiled.cache_clear()
    source = weights(tmp_path, {"w": spread(torch.float32, (64, 64), 0)})
    made = command.pack(source, tmp_path / "out", VariantWish(method="int4-groups"))
    kernels.compiled.cache_clear()
    assert made["notes"] == ["compressed without the compiled kernel, 10 times slower: there is no g++"]


def test_what_is_kept_is_named_with_the_reason(tmp_path: Path) -> None:
    """Vectors, integers, skipped layers, rows that do not divide and what would not shrink stay, bit for bit."""
    tensors = {
        "norm.weight": torch.ones(64),
        "tokens": torch.arange(128).view(2, 64),
        "lm_head.weight": spread(torch.bfloat16, (10, 64), 0),
        "odd.weight": spread(torch.bfloat16, (10, 65), 0),
        "empty": torch.zeros(0, 64),
        "flags": torch.ones(2, 64, dtype=torch.bool),
        "fine.weight": spread(torch.bfloat16, (10, 64), 0),
    }
    rows = pack(weights(tmp_path, tensors), tmp_path / "out", "int4-groups", skip=["lm_head"])
    reasons = {name: row.reason for name, row in rows.items() if row.action == report.KEPT}
    assert reasons == {
        "norm.weight": report.SMALL,
        "tokens": "I64 is not among BF16, F16, F32, F64",
        "lm_head.weight": "skipped by lm_head",
        "odd.weight": "rows of 65 do not divide into groups of 32",
        "empty": "empty",
        "flags": "BOOL is not among BF16, F16, F32, F64",
    }
    found = unpacked(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in reasons)
    assert rows["fine.weight"].bytes_out == 10 * (32 + 2 * 2)
    tiny = weights(tmp_path / "tiny", {"tiny": torch.ones(9, 1), "fine": torch.ones(9, 64)})
    assert pack(tiny, tmp_path / "tiny" / "out", "int8-rows")["tiny"].reason == "45 bytes would be no fewer"


def test_nothing_to_change_a_name_taken_and_a_packed_file_are_not_applicable(tmp_path: Path) -> None:
    """No silent no-op: it says which tensors it could not change and why."""
    vectors = weights(tmp_path / "a", {"b": torch.ones(64)})
    with pytest.raises(NotApplicable, match=r"changes no tensor \(b: a bias, a norm or a buffer\)"):
        pack(vectors, tmp_path / "out", "int8-rows")
    taken = weights(tmp_path / "b", {"w": torch.ones(64, 64), "w.scale": torch.ones(64)})
    with pytest.raises(NotApplicable, match=r"tensor w: w\.scale, where its scales go, is a tensor already"):
        pack(taken, tmp_path / "out", "int8-rows")
    fine = weights(tmp_path / "c", {"w": torch.ones(64, 64)})
    pack(fine, tmp_path / "once", "int8-rows")
    with pytest.raises(NotApplicable, match=r"model\.safetensors is packed already"):
        pack(tmp_path / "once" / "model.safetensors", tmp_path / "twice", "int8-rows")


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_threads_change_nothing(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor in many blocks by three threads is, byte for byte, the same file as in one block by one."""
    tensors = {"w": spread(torch.bfloat16, (256, 192), 0), "v": spread(torch.float32, (33, 64), 1), "n": torch.ones(9)}
    source = weights(tmp_path, tensors)
    whole = pack(source, tmp_path / "whole", method)
    monkeypatch.setattr(streaming, "BLOCK", 1000)
    monkeypatch.setattr(streaming, "THREADS", 3)
    parts = pack(source, tmp_path / "parts", method)
    assert (tmp_path / "whole" / source.name).read_bytes() == (tmp_path / "parts" / source.name).read_bytes()
    assert whole == parts


def test_every_tensor_is_aligned_in_the_file(tmp_path: Path) -> None:
    """Readers that view tensors in place (numpy, Rust) can."""
    tensors = {"a": torch.ones(3, 65, dtype=torch.float16), "b": torch.ones(5), "c": torch.ones(7, 67)}
    pack(weights(tmp_path, tensors), tmp_path / "out", "int8-rows")
    header = packed.read_header(tmp_path / "out" / "model.safetensors")
    sizes = {"F32": 4, "F16": 2, "I8": 1}
    assert all((header.data_start + one.start) % sizes[one.dtype] == 0 for one in header.tensors.values())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return original_artifact(tmp_path_factory.mktemp("original"), mlp(), PIXELS)


def sharded(original: Original, folder: Path) -> tuple[Original, list[Path]]:
    """The same original, its weights in two files."""
    [file] = original.manifest.files
    tensors = load_file(original.cache(file.digest))
    names = sorted(tensors)
    paths = [
        weights(folder, {name: tensors[name] for name in part}, f"model-{number}-of-2.safetensors")
        for number, part in enumerate((names[:2], names[2:]))
    ]
    files = tuple(ArtifactFile(path=path.name, size=path.stat().st_size, digest=str(path)) for path in paths)
    return replace(original, manifest=original.manifest.model_copy(update={"files": files}), cache=Path), paths


def test_the_variant_computes_nearly_what_the_original_does(original: Original, tmp_path: Path) -> None:
    """Built for a version, it is as small as promised and names its encoding and every tensor."""
    done: list[float] = []
    built = streaming.build(replace(order(original, tmp_path / "new", "int8-rows"), progress=done.append))
    [(path, file)] = built.files.items()
    assert path == "model.safetensors"
    assert built.encoding is not None
    assert built.encoding.kind == "packed"
    before, after = (sum(getattr(row, key) for row in built.tensors) for key in ("bytes_in", "bytes_out"))
    assert built.promised_ratio == after / before
    assert built.promised_ratio < 0.3
    assert built.compute_dtypes == ("F32",)
    assert done[-1] == 1.0
    old = load_file(original.cache(original.manifest.files[0].digest))
    new = packed.unpack({path: file})
    assert {row.name for row in built.tensors} == old.keys() == new.keys()
    assert all(torch.allclose(new[name], old[name], atol=2e-3) for name in old)


def test_a_host_serves_the_packed_artifact(original: Original, tmp_path: Path) -> None:
    """The torch engine unpacks it while loading, twice to the same bits, and answers nearly as the original."""
    built = streaming.build(order(original, tmp_path / "new", "int8-rows"))
    [(path, file)] = built.files.items()
    digest = digest_file(file)
    changes = {"encoding": built.encoding, "files": (ArtifactFile(path=path, size=-1, digest=digest),)}
    manifest = original.manifest.model_copy(update=changes)
    pixels = {"pixels": np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)}
    answers = [
        load(one, lambda name: file if name == digest else original.cache(name)).infer(pixels)["output"]
        for one in (original.manifest, manifest, manifest)
    ]
    assert np.array_equal(answers[1], answers[2])
    assert not np.array_equal(answers[0], answers[1])
    assert np.allclose(answers[0], answers[1], atol=0.02)


def test_shard_by_shard_gives_the_same_weights_as_the_whole(original: Original, tmp_path: Path) -> None:
    """Each shard is built by itself, on any worker; together they are the variant."""
    whole = streaming.build(order(original, tmp_path / "whole", "int4-groups"))
    parts, paths = sharded(original, tmp_path / "shards")
    built = [streaming.build_shard(order(parts, tmp_path / f"{n}", "int4-groups"), n) for n in range(2)]
    assert [list(one.files) for one in built] == [[path.name] for path in paths]
    together = packed.unpack({path: file for one in built for path, file in one.files.items()})
    alone = packed.unpack(whole.files)
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert sorted((row for one in built for row in one.tensors), key=str) == sorted(whole.tensors, key=str)
    with pytest.raises(BuildFailed, match="2 weight files"):
        streaming.build(order(parts, tmp_path / "no", "int4-groups"))


def test_the_command_packs_a_folder_of_shards_with_a_new_index(original: Original, tmp_path: Path) -> None:
    """It runs on any safetensors files, without a registry, and prints the report."""
    _, paths = sharded(original, tmp_path / "in")
    app = command.app()
    args = [str(tmp_path / "in"), "--method", "int4-groups", "--group", "64", "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, [*args, "--json"])
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
    assert told["files"] == [path.name for path in paths]
    assert told["bytes_out"] < 0.2 * told["bytes_in"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: file for file in told["files"] for name in load_file(tmp_path / "out" / file)}
    assert index == {"metadata": {"total_size": told["bytes_out"]}, "weight_map": held}
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 1
    assert "File exists" in again.output
