"""The ONNX engine: what it runs as onnxruntime does, and every file that it refuses before onnxruntime sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3
from fixtures.engines import LocalBlobs, local_blobs

from weighbridge.engines.errors import EngineError, InvalidInput, LoadError
from weighbridge.engines.load import load
from weighbridge.engines.manifest import ArtifactFile, Encoding, Golden, Manifest, Program, TensorSpec
from weighbridge.engines.onnx_structure import structure

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

__all__ = ["local_blobs"]
FLOAT, BFLOAT16 = 1, 16
WEIGHT = np.arange(8, dtype=np.float32).reshape(4, 2)


def model(*nodes: Any, weight: Any = None, kind: int = FLOAT, functions: Any = ()) -> Any:
    """x (batch, 4) → y (batch, 2), by `nodes` or x @ w."""
    helper = onnx.helper
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", kind, ["batch", 4])],
        [helper.make_tensor_value_info("y", kind, ["batch", 2])],
        [onnx.numpy_helper.from_array(WEIGHT, "w") if weight is None else weight],
    )
    domains = {"": 20} | {node.domain: 1 for node in nodes if node.domain}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


Manifests = Callable[..., Manifest]


@pytest.fixture
def artifact(local_blobs: LocalBlobs) -> Manifests:
    """A manifest of the model's file; `changes` are the manifest's fields."""

    def make(made: Any, datatype: str = "FP32", **changes: Any) -> Manifest:
        data = made if isinstance(made, bytes) else made.SerializeToString()
        digest = local_blobs.add(data)
        manifest = Manifest(
            variant="onnx",
            files=(ArtifactFile(path="model.onnx", size=len(data), digest=digest),),
            program=Program(kind="onnx", name="model.onnx", digest=digest),
            binding={},
            inputs=(TensorSpec(name="x", datatype=datatype, shape=(-1, 4)),),
            outputs=(TensorSpec(name="y", datatype=datatype, shape=(-1, 2)),),
            golden=Golden(digest="0" * 64, size=0, rtol=1e-4, atol=1e-5),
            engine={"name": "onnxruntime", "minimum": "1.18"},
        )
        return manifest.model_copy(update=changes)

    return make


def test_answers_any_batch(artifact: Manifests, local_blobs: LocalBlobs) -> None:
    """A loaded file answers batches of any size by the names of the manifest, also with more threads."""
    for threads in (None, 2):
        session = load(artifact(model()), local_blobs, threads=threads)
        for rows in (1, 3):
            x = np.ones((rows, 4), dtype=np.float32)
            np.testing.assert_allclose(session.infer({"x": x})["y"], x @ WEIGHT)
        session.close()
        with pytest.raises(EngineError, match="closed"):
            session.infer({"x": x})


def test_takes_bfloat16(artifact: Manifests, local_blobs: LocalBlobs) -> None:
    """BF16 goes in and comes out, which numpy and onnxruntime cannot do between them."""
    node = onnx.helper.make_node
    cast = [
        node("Cast", ["x"], ["a"], to=FLOAT),
        node("MatMul", ["a", "w"], ["b"]),
        node("Cast", ["b"], ["y"], to=BFLOAT16),
    ]
    session = load(artifact(model(*cast, kind=BFLOAT16), "BF16"), local_blobs)
    x = np.full((3, 4), 0.5, dtype=ml_dtypes.bfloat16)
    seen = session.infer({"x": x})["y"]
    assert seen.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(seen.astype(np.float32), x.astype(np.float32) @ WEIGHT)


def test_checks_inputs(artifact: Manifests, local_blobs: LocalBlobs) -> None:
    """A wrong name, datatype or shape is the client's fault, and says which; a failing program is not."""
    session = load(artifact(model()), local_blobs)
    good = np.ones((2, 4), dtype=np.float32)
    for given in ({"z": good}, {"x": good.astype(np.float64)}, {"x": good[:, :3]}):
        with pytest.raises(InvalidInput):
            session.infer(given)
    node = onnx.helper.make_node
    reshaped = model(node("Reshape", ["x", "s"], ["a"]), node("MatMul", ["a", "v"], ["y"]))
    for name, value in {"s": np.array([-1, 3]), "v": WEIGHT[:3]}.items():
        reshaped.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    with pytest.raises(EngineError, match="the program failed"):
        load(artifact(reshaped), local_blobs).infer({"x": good})


def external() -> Any:
    """A weight in a file beside the model."""
    tensor = onnx.numpy_helper.from_array(WEIGHT, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def inside() -> Any:
    """An operator of a strange domain, hidden in the branch of an If."""
    node = onnx.helper.make_node
    made = onnx.helper.make_tensor_value_info("b", FLOAT, None)
    bad = onnx.helper.make_graph([node("Evil", ["x"], ["b"], domain="com.evil")], "bad", [], [made])
    fine = onnx.helper.make_graph([node("MatMul", ["x", "w"], ["b"])], "fine", [], [made])
    return node("If", ["c"], ["y"], then_branch=fine, else_branch=bad)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: model(weight=external()), "'w' lies outside the file"),
        (lambda: model(onnx.helper.make_node("Evil", ["x"], ["y"], domain="com.evil")), "com.evil.Evil is not allowed"),
        (lambda: model(onnx.helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")), "EPContext"),
        (lambda: model(inside()), "com.evil.Evil is not allowed"),
        (
            lambda: model(
                functions=[onnx.helper.make_function("f", "F", ["a"], ["b"], [], [onnx.helper.make_opsetid("", 20)])]
            ),
            "functions",
        ),
        (lambda: model().SerializeToString()[:-9], "not a readable ONNX file"),
        (lambda: b"", "no operators"),
        (lambda: b"\x3b" * 9, "wire type 3"),
        (lambda: b"PK\x03\x04 a zip file", "not a readable ONNX file"),
        (lambda: model(onnx.helper.make_node("NoSuch", ["x"], ["y"])), "onnxruntime cannot load it"),
    ],
    ids=["external", "domain", "contributed", "subgraph", "function", "short", "empty", "group", "zip", "unknown"],
)
def test_refuses_the_file(made: Callable[[], Any], said: str, artifact: Manifests, local_blobs: LocalBlobs) -> None:
    """Files beside the model, foreign operators and broken files are refused with the reason."""
    with pytest.raises(LoadError, match=said):
        load(artifact(made()), local_blobs)


SPEC = TensorSpec(name="y", datatype="FP32", shape=(-1, 2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"program": Program(kind="onnx", name="m", digest="1" * 64)}, "the one file"),
        ({"program": Program(kind="onnx", name="m")}, "with a digest"),
        ({"program": Program(kind="factory", name="m:f", digest="1" * 64)}, "kind onnx"),
        ({"files": ()}, "the one file"),
        ({"binding": {"w": "w"}}, "nothing to bind"),
        ({"encoding": Encoding(kind="packed")}, "nothing to bind or decode"),
        ({"outputs": (SPEC.model_copy(update={"name": "z"}),)}, "the program's outputs are y"),
        ({"outputs": (SPEC.model_copy(update={"datatype": "FP16"}),)}, r"tensor\(float\) in the program, FP16"),
        ({"outputs": (SPEC.model_copy(update={"shape": (-1, 3)}),)}, r"\[-1, 3\] in the manifest"),
        ({"inputs": (SPEC.model_copy(update={"name": "x", "shape": (-1, 2, 2)}),)}, "input x is"),
        ({"engine": {"name": "onnxruntime", "minimum": "99.1"}}, "needs onnxruntime 99.1"),
        ({"engine": {"name": "tensorrt"}}, "needs the engine tensorrt"),
    ],
)
def test_refuses_a_manifest_that_is_not_the_files(
    changes: dict[str, Any], said: str, artifact: Manifests, local_blobs: LocalBlobs
) -> None:
    """Digest, files, names, datatypes and ranks must be what the manifest promises."""
    with pytest.raises(LoadError, match=said):
        load(artifact(model(), **changes), local_blobs)


def test_refuses_other_bytes(artifact: Manifests, tmp_path: Path) -> None:
    """A file that was changed on the host's disk is not loaded."""
    manifest = artifact(model())
    other = tmp_path / "other.onnx"
    other.write_bytes(model(weight=onnx.numpy_helper.from_array(WEIGHT + 1, "w")).SerializeToString())
    with pytest.raises(LoadError, match=f"digest is {blake3(other.read_bytes()).hexdigest()}"):
        load(manifest, lambda _: other)


def test_names_what_is_missing(artifact: Manifests, local_blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without onnxruntime, or without its CUDA provider, the message says what to install."""
    manifest = artifact(model())
    with pytest.raises(LoadError, match=r"does not serve cuda:1 .*onnxruntime-gpu"):
        load(manifest, local_blobs, device="cuda:1")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(LoadError, match=r"pip install 'weighbridge\[onnx\]'"):
        load(manifest, local_blobs)


def test_structure_sees_what_onnx_sees() -> None:
    """The walk finds the operators, also those of subgraphs, without looking at weights."""
    seen = structure(model(inside()).SerializeToString())
    assert seen.operators == {("", "If"), ("", "MatMul"), ("com.evil", "Evil")}
    assert not seen.external
    assert not seen.functions
