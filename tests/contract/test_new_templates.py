"""What workers could not read of a template later is refused when it is registered, with the field and the rule."""

from __future__ import annotations

import json
import re
from typing import Any

from fixtures.api import Api
from pydantic import BaseModel

from weighbridge.engines import binding, datatypes, manifest
from weighbridge.registry import template_schemas, templates
from weighbridge.storage.safetensors_header import BITS
from weighbridge.workers import bindings

W = {"shape": [4], "dtype": "F32"}
X = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
LENGTH = {"axis": 1, "minimum": 2}


def _good(api: Api) -> dict[str, Any]:
    digest = api.blobs.put_bytes(b"a program").digest
    contract = {
        **X,
        "shape": [-1, -1],
        "lengths": [LENGTH | {"of": [{"input": "x", "axis": 0}]}],
        "values": {"minimum": [0]},
    }
    parameters = {"w": W, "v": W | {"tied": "w"}}
    return {
        "name": "good", "digest": digest, "fingerprint": "f", "parameters": parameters, "inputs": [contract],
        "outputs": [X],
    }  # fmt: skip


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"parameters": ["w"]}, "parameters"),
    ({"parameters": None}, "parameters"),
    ({"parameters": {"w": None}}, "parameters.w"),
    ({"parameters": {"w": {}}}, "parameters.w.shape: Field required"),
    ({"parameters": {"w": W | {"shape": "many"}}}, "parameters.w.shape"),
    ({"parameters": {"w": W | {"shape": ["4"]}}}, "parameters.w.shape.0"),
    ({"parameters": {"w": W | {"shape": [4.0]}}}, "parameters.w.shape.0"),
    ({"parameters": {"w": W | {"shape": [True]}}}, "parameters.w.shape.0"),
    ({"parameters": {"w": W | {"shape": [-1]}}}, "parameters.w.shape.0: .*greater than or equal to 0"),
    ({"parameters": {"w": W | {"shape": [2**63]}}}, "parameters.w.shape.0: .*less than"),
    ({"parameters": {"w": W | {"shape": [2**62, 2**62]}}}, "parameters.w: .*2\\^63 bytes"),
    ({"parameters": {"w": W | {"shape": [1] * 33}}}, "parameters.w.shape: .*32"),
    ({"parameters": {"w": W | {"dtype": "float32"}}}, "parameters.w.dtype: .*known are"),
    ({"parameters": {"w": W | {"dtype": None}}}, "parameters.w.dtype"),
    ({"parameters": {"w": W | {"tied": "nobody"}}}, "tied to 'nobody'"),
    ({"parameters": {"w": W | {"unread": "yes"}}}, "parameters.w.unread"),
    ({"parameters": {"w": W | {"more": 1}}}, "parameters.w.more"),
    ({"parameters": {"": W}}, "parameters"),
    ({"parameters": {"w" * 1025: W}}, "1024"),
    ({"inputs": 5}, "inputs"),
    ({"inputs": [{"name": "x"}]}, "inputs.0.datatype: Field required"),
    ({"inputs": [X | {"datatype": "F32"}]}, "inputs.0.datatype: .*FP32"),
    ({"inputs": [X | {"shape": [-2]}]}, "inputs.0.shape.0"),
    ({"inputs": [X | {"shape": [None]}]}, "inputs.0.shape.0"),
    ({"inputs": [X | {"name": ""}]}, "inputs.0.name"),
    ({"inputs": [X, X]}, "'x' is there twice"),
    ({"inputs": [X | {"lengths": [{}]}]}, "inputs.0.lengths.0.axis"),
    ({"inputs": [X | {"lengths": [LENGTH | {"axis": 2}]}]}, "axis 2"),
    ({"inputs": [X | {"lengths": [LENGTH | {"maximum": 1}]}]}, "inputs.0.lengths.0: .*minimum of 2"),
    ({"inputs": [X | {"lengths": [LENGTH | {"step": 0}]}]}, "inputs.0.lengths.0.step"),
    ({"inputs": [X | {"lengths": [LENGTH | {"of": [{"input": "y", "axis": 0}]}]}]}, "axis 0 of 'y'"),
    ({"inputs": [X | {"values": {"minimum": [0.5]}}]}, "inputs.0.values.minimum.0"),
    ({"inputs": [X | {"values": {"minimum": 0}}]}, "inputs.0.values.minimum"),
    ({"inputs": [X | {"values": {"maximum": [2**64]}}]}, "inputs.0.values.maximum.0"),
    ({"inputs": [X | {"values": {"below": {"input": "x", "axis": 9}}}]}, "axis 9 of 'x'"),
    ({"outputs": [None]}, "outputs.0"),
    ({"outputs": [X | {"lengths": "long"}]}, "outputs.0.lengths"),
    ({"fingerprint": "f" * 65}, "fingerprint"),
    ({"digest": "A" * 64}, "digest"),
    ({"digest": "0" * 64}, "is not there: upload"),
]


def test_malformed_templates_are_refused_and_harm_nobody(api: Api) -> None:
    """Whoever sends one learns the field and the rule; checkpoints of other templates go on, on both databases."""
    http, good = api.http(), _good(api)
    for wrong, said in WRONG:
        answer = http.post("/v1/templates", json=good | {"name": "bad"} | wrong)
        assert (wrong, answer.status_code) == (wrong, 422)
        assert re.search(said, answer.json()["detail"]), (wrong, answer.json()["detail"])
    assert http.post("/v1/templates", json=good).status_code == 201
    with api.db.read() as tx:
        rows = templates.every(tx)
    known, malformed = bindings.of_rows(rows)
    assert ([one.name for one in known], malformed) == (["good"], {})
    sent = good["parameters"], good["inputs"], good["outputs"]
    assert (rows[0].parameters, rows[0].inputs, rows[0].outputs) == sent, "kept without defaults"


def test_a_thousand_wrong_fields_are_a_short_answer(api: Api) -> None:
    """It may be kept in a log; half of a surrogate pair in a name breaks no answer."""
    many = {f"w{n}\ud800": {"shape": "x", "dtype": "x"} for n in range(1000)}
    answer = api.http().post("/v1/templates", content=json.dumps(_good(api) | {"parameters": many}))
    assert (answer.status_code, len(answer.content) < 5000) == (422, True)


def test_a_program_whose_bytes_are_others_is_refused(api: Api) -> None:
    """Damaged, or put there by whoever writes the store: 422, and nothing is registered."""
    good = _good(api)
    api.blobs.store.put(api.blobs.key(good["digest"]), b"not what")
    answer = api.http().post("/v1/templates", json=good)
    assert (answer.status_code, "is damaged" in answer.json()["detail"]) == (422, True)
    assert api.http().get("/v1/templates").json()["items"] == []


def test_what_the_registry_takes_is_what_engines_read() -> None:
    """Field by field, and every datatype: the registry imports no engine, so that a test compares them."""
    pairs: list[tuple[type[BaseModel], type[BaseModel]]] = [
        (template_schemas.TemplateParameter, binding.Parameter),
        (template_schemas.TemplateSpec, manifest.TensorSpec),
        (template_schemas.TemplateLength, manifest.Length),
        (template_schemas.TemplateValues, manifest.Values),
        (template_schemas.TemplateTerm, manifest.Term),
    ]
    for ours, theirs in pairs:
        assert ours.model_fields.keys() == theirs.model_fields.keys()
    assert template_schemas.DATATYPES == datatypes.NAMES
    assert {datatypes.to_safetensors(name) for name in datatypes.NAMES if name != datatypes.BYTES} <= BITS.keys()
