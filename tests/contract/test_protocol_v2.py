"""The host's front against a real `tritonclient.http`, and against clients that misbehave."""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
from fixtures.serving import FAKE, Host

triton = pytest.importorskip("tritonclient.http")

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def client(served: Host) -> Iterator[Any]:
    with triton.InferenceServerClient(served.url) as client:
        yield client


@pytest.fixture
def http(served: Host) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{served.url}") as client:
        yield client


def wire(array: np.ndarray[Any, Any], datatype: str, *, binary: bool, name: str = "x") -> Any:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_infers_with_json_and_binary_tensors(client: Any, binary_in: bool, binary_out: bool) -> None:
    """Every mix of forms gives the same numbers, the live version's number and the request's id."""
    wanted = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    result = client.infer("scale", [wire(X, "FP32", binary=binary_in)], outputs=wanted, request_id="q7")
    np.testing.assert_array_equal(result.as_numpy("y"), X * 2)
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("scale", "2", "q7")


def test_no_outputs_named_gives_all_of_them_binary(client: Any) -> None:
    """The client then sends binary_data_output=true."""
    result = client.infer("scale", [wire(X, "FP32", binary=True)])
    assert result.get_output("y")["parameters"]["binary_data_size"] == X.nbytes
    np.testing.assert_array_equal(result.as_numpy("y"), X * 2)


def test_a_version_that_is_not_live_can_be_addressed(client: Any) -> None:
    """/versions/1/ answers while version 2 is live."""
    result = client.infer("scale", [wire(X, "FP32", binary=True)], model_version="1")
    np.testing.assert_array_equal(result.as_numpy("y"), X)
    assert result.get_response()["model_version"] == "1"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_bodies(client: Any, algorithm: str) -> None:
    """The body is decompressed before it is split."""
    for binary in (True, False):
        result = client.infer(
            "scale",
            [wire(X, "FP32", binary=binary)],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        np.testing.assert_array_equal(result.as_numpy("y"), X * 2)


@pytest.mark.parametrize(
    ("array", "datatype"),
    [
        (np.array([["é".encode(), b""], [b"\x00\xff", b"abc"]], object), "BYTES"),
        (np.array([True, False]), "BOOL"),
        (np.array([[-1, 2**62]]), "INT64"),
        (np.array([0, 2**64 - 1], np.uint64), "UINT64"),
        (np.array([1.5, np.inf], np.float16), "FP16"),
        (np.array([1.5, -2], ml_dtypes.bfloat16), "BF16"),
    ],
)
def test_every_datatype_crosses_in_binary(client: Any, array: Any, datatype: str) -> None:
    """What goes in as binary data comes back bit for bit."""
    seen = client.infer("scale", [wire(array, datatype, binary=True, name="echo")]).as_numpy("echo")
    assert seen.shape == array.shape
    assert seen.tolist() == array.tolist()


def test_health_and_metadata(client: Any) -> None:
    """What the client asks before it infers."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "1")
    assert not client.is_model_ready("scale", "9")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "weighbridge"
    metadata = client.get_model_metadata("scale")
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert {(row["name"], row["version"], row["state"]) for row in client.get_model_repository_index()} == {
        ("scale", "1", "READY"),
        ("scale", "2", "READY"),
    }


def test_errors_decode_in_the_client(client: Any) -> None:
    """Errors are {"error": …}: the client raises them with the message and the status."""
    for model, version, name, status, words in [
        ("nobody", "", "x", "404", "not assigned"),
        ("scale", "9", "x", "404", "held: 1, 2"),
        ("scale", "", "z", "400", "unknown input 'z'"),
    ]:
        with pytest.raises(triton.InferenceServerException, match=words) as caught:
            client.infer(model, [wire(X, "FP32", binary=True, name=name)], model_version=version)
        assert caught.value.status() == status
    with pytest.raises(triton.InferenceServerException, match="registry assigns"):
        client.load_model("scale")
    with pytest.raises(triton.InferenceServerException, match="registry assigns"):
        client.unload_model("scale")


def infer(http: httpx.Client, *data: float, **headers: str) -> httpx.Response:
    body = {"inputs": [{"name": "x", "shape": [1, len(data)], "datatype": "FP32", "data": data}]}
    return http.post("/v2/models/scale/infer", json=body, headers=headers)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/scale/infer", 405),
        ("POST", "/v2/models/scale", 405),
        ("GET", "/v2/repository/index", 405),
        ("GET", "/v2/models/", 404),
        ("GET", "/v2/models/scale/versions", 404),
        ("GET", "/v2/models/scale/versions/1/what", 404),
        ("GET", "/", 404),
        ("GET", "/v2/models/..%2f..%2fetc/ready", 404),
        ("POST", "/v2/models/scale/infer", 400),
    ],
)
def test_every_refusal_is_an_error_object(http: httpx.Client, method: str, path: str, status: int) -> None:
    """Whatever is wrong, the body is {"error": "…"}."""
    answer = http.request(method, path)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({}, b"\xff\xfe", 400),
        ({"inference-header-content-length": "9999"}, b"{}", 400),
        ({"inference-header-content-length": "-1"}, b"{}", 400),
        ({"content-encoding": "br"}, b"{}", 415),
        ({"content-encoding": "gzip"}, b"not gzip", 400),
        ({"content-encoding": "deflate"}, zlib.compress(bytes(FAKE.max_body_bytes + 1)), 413),
        ({}, bytes(FAKE.max_body_bytes + 1), 413),
    ],
)
def test_a_broken_body_is_the_clients_mistake(
    http: httpx.Client, headers: dict[str, str], content: bytes, status: int
) -> None:
    """A 4xx that says why; the child lives on, and errors are not counted against the version."""
    before = errors(http)
    answer = http.post("/v2/models/scale/infer", content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert infer(http, 1, 2, 3, 4).status_code == 200
    assert errors(http) == before


def test_an_engine_that_fails_on_an_input_answers_500_and_goes_on(http: httpx.Client) -> None:
    """The error names the exception. The version before fails on it too, so the fault is the client's."""
    before, clients = errors(http), blamed(http, "client")
    answer = infer(http, -500.0)
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "RuntimeError: the engine fails on this input"},
    )
    assert infer(http, 1).status_code == 200
    until(lambda: blamed(http, "client") == clients + 1)  # the other version is asked after the answer
    assert errors(http) == before


def test_an_engine_that_fails_on_an_input_without_a_version_before(http: httpx.Client) -> None:
    """Nobody to ask: the golden holds, so that it is no error of the version, but counted apart."""
    before, apart = errors(http, "1"), blamed(http, "input", "1")
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [-500.0]}]}
    assert http.post("/v2/models/scale/versions/1/infer", json=body).status_code == 500
    assert (errors(http, "1"), blamed(http, "input", "1")) == (before, apart + 1)


def until(condition: Callable[[], bool]) -> None:
    deadline, tick = time.monotonic() + 20, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        tick.wait(0.01)


def test_a_body_in_pieces_is_put_together(served: Host) -> None:
    """Chunked transfer, slowly; and a body that grows past the cap without announcing it is cut off."""
    chunks = [b'{"inputs":[{"name":"x","shape":[1],', b'"datatype":"FP32",', b'"data":[3]}]}']
    with httpx.Client(base_url=f"http://{served.url}") as http:
        answer = http.post("/v2/models/scale/infer", content=iter(chunks))
        assert answer.json()["outputs"][0]["data"] == [6.0]
        endless = (bytes(2**16) for _ in range(FAKE.max_body_bytes // 2**16 + 2))
        assert http.post("/v2/models/scale/infer", content=endless).status_code == 413


def test_pipelined_requests_are_answered_in_order(served: Host) -> None:
    """Two requests in one segment on one connection."""
    host, port = served.url.split(":")
    ask = "GET /v2/models/scale/versions/{}/ready HTTP/1.1\r\nHost: h\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall((ask.format(1) + ask.format(9)).encode())
        seen = b""
        while seen.count(b"HTTP/1.1") < 2 or not seen.endswith(b"}"):
            seen += sock.recv(4096)
    assert seen.index(b"200") < seen.index(b"404")


def blamed(http: httpx.Client, fault: str, version: str = "2") -> float:
    name = f'weighbridge_unanswered_total{{blame="{fault}",model="scale",variant="original",version="{version}"}}'
    return next(float(line.split()[-1]) for line in http.get("/metrics").text.splitlines() if name in line)


def errors(http: httpx.Client, version: str = "2") -> float:
    name = f'weighbridge_errors_total{{model="scale",variant="original",version="{version}"}}'
    return next(float(line.split()[-1]) for line in http.get("/metrics").text.splitlines() if name in line)


def test_metrics_are_per_version(http: httpx.Client) -> None:
    """Requests, errors and a latency histogram carry model, version and variant."""
    infer(http, 1, 2)
    text = http.get("/metrics").text
    labels = 'model="scale",variant="original",version="2"'
    assert f"weighbridge_requests_total{{{labels}}}" in text
    assert f'weighbridge_latency_seconds_bucket{{le="+Inf",{labels}}}' in text
    assert f"weighbridge_ready{{{labels}}} 1.0" in text
