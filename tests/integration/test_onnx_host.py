"""A host that serves an ONNX artifact: the real fork server, the real engine, onnxruntime's threads in a fork."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest
from fixtures import compression
from fixtures.compression import blobs_in, mlp, original_artifact
from fixtures.serving import FAKE, serving_host

from weighbridge.engines import golden
from weighbridge.engines.load import load
from weighbridge.engines.manifest import ArtifactFile, Golden
from weighbridge.hosts.children import ChildProgram
from weighbridge.hosts.router import SlotSpec

pytest.importorskip("onnxruntime")
methods = pytest.importorskip("weighbridge.workers.compression.onnx_methods")

TWO_THREADS = ChildProgram(environment={"OMP_NUM_THREADS": "2"})


@pytest.mark.slow
def test_serves_an_onnx_variant(tmp_path: Path) -> None:
    """A quantized ONNX file goes live beside torch's own children, and answers bit for bit as where it was made."""
    original = original_artifact(tmp_path / "blobs", mlp(), compression.PIXELS)
    built = methods.build(compression.order(original, tmp_path / "made", "onnx-int8-dynamic"))
    blobs = blobs_in(tmp_path / "blobs")
    file = blobs.put_bytes(built.files["model.onnx"].read_bytes())
    manifest = original.manifest.model_copy(
        update={
            "variant": "onnx-int8-dynamic",
            "files": (ArtifactFile(path="model.onnx", size=file.size, digest=file.digest),),
            "program": built.program,
            "binding": {},
            "engine": built.engine,
        }
    )
    session = load(manifest, original.cache)
    reference = blobs.put_bytes(golden.make_reference(session))
    manifest = manifest.model_copy(
        update={"golden": Golden(digest=reference.digest, size=reference.size, rtol=3e-2, atol=3e-2)}
    )
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    want = session.infer({"pixels": x})["output"]
    folder = tmp_path / "blobs" / Path(blobs.key(file.digest)).parents[1]
    specs = [
        SlotSpec("digits", version, one.variant, one.digest, one, str(folder))
        for version, one in (("1", original.manifest), ("2", manifest))
    ]

    async def serve() -> list[float]:
        settings = FAKE.model_copy(update={"load_seconds": 60, "request_seconds": 30, "hang_seconds": 20})
        async with (
            serving_host(folder, settings, TWO_THREADS) as host,
            httpx.AsyncClient(base_url=f"http://{host.url}", timeout=30) as http,
        ):
            for spec in specs:
                await host.swapper.go_live(await host.swapper.load(spec))
            body = {"inputs": [{"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": x[0].tolist()}]}
            answer = (await http.post("/v2/models/digits/infer", json=body)).json()
            assert answer["model_version"] == "2"
            data: list[float] = answer["outputs"][0]["data"]
            return data

    np.testing.assert_array_equal(np.array(asyncio.run(serve()), dtype=np.float32), want[0])
