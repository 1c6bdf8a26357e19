"""The stage validate on real files: what passes becomes an artifact, what does not is named, nothing is executed."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from fixtures.checkpoints import raw, safetensors
from fixtures.engines import INPUTS, make_checkpoint, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file
from safetensors.torch import save_file as save_torch

from weighbridge.engines import golden, template
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest, TensorSpec
from weighbridge.registry.recipe import ProgramWish
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.in_place import InPlace
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin
from weighbridge.storage.published import Published, PublishedFile
from weighbridge.storage.streaming import digest_bytes
from weighbridge.workers import proving
from weighbridge.workers.bindings import Programs, TemplateInfo
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.validate import ValidateTask, main, validate


class Scale:
    """A bucket folder, a blob folder and the operator's templates: drop files, weigh them."""

    def __init__(self, root: Path, made: Any) -> None:
        self.drops, self.store = root / "bucket", root / "store"
        self.drops.mkdir()
        self.store.mkdir()
        self.source, self.blobs = FolderStore(self.drops), Blobs(FolderStore(self.store))
        self.blobs.put_bytes(made.pt2)
        self.template = TemplateInfo(
            "digits", made.digest, made.fingerprint, made.parameters, made.inputs, made.outputs
        )
        self.programs = Programs((self.template,))

    def task(self, path: str, **changes: Any) -> ValidateTask:
        files = tuple(pin(info) for info in self.source.list(path))
        return replace(ValidateTask("digits", 1, path, files, programs=self.programs), **changes)

    def path(self, digest: str) -> Path:
        return InPlace(self.blobs).path(digest)

    def weigh(self, path: str, **changes: Any) -> Outcome:
        return self.run(self.task(path, **changes))

    def run(self, task: ValidateTask) -> Outcome:
        outcome = validate(task, source=self.source, blobs=self.blobs, cache=self.path)
        json.dumps(outcome.facts, allow_nan=False)
        return outcome


@pytest.fixture
def scale(tmp_path: Path, digits_template: Any) -> Scale:
    return Scale(tmp_path, digits_template)


def test_a_good_checkpoint_becomes_an_artifact_that_serves(scale: Scale) -> None:
    """Passed: the manifest and everything it names are blobs, and a host can load, run and prove them."""
    make_checkpoint(scale.drops / "a.safetensors", prefix="module.")
    outcome = scale.weigh("a.safetensors")
    assert (outcome.verdict, outcome.reason) == ("passed", "9 tensors, finite, bound to template:digits")
    assert outcome.facts["evidence"] == {"bytes": True, "tensors": True, "program": True, "author_golden": False}
    manifest = Manifest.model_validate_json(scale.blobs.get(outcome.facts["artifact_digest"]))
    assert manifest.digest == outcome.facts["artifact_digest"]
    assert manifest.binding["module.head.weight"] == "head.weight"
    session = load(manifest, scale.path)
    golden.check(session, scale.blobs.get(manifest.golden.digest), *manifest.golden.tolerance)
    assert scale.weigh("a.safetensors").facts == outcome.facts


def test_shards_make_one_artifact(scale: Scale) -> None:
    """A folder with an index: the shards are the files, the index must say what they hold."""
    folder = scale.drops / "run"
    folder.mkdir()
    names = sorted(weights())
    parts = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for name, part in parts.items():
        save_file({tensor: weights()[tensor] for tensor in part}, folder / name)
    index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "mlp"}')
    outcome = scale.weigh("run/")
    assert outcome.verdict == "passed"
    manifest = Manifest.model_validate_json(scale.blobs.get(outcome.facts["artifact_digest"]))
    assert [file.path for file in manifest.files] == sorted(parts)
    index["weight_map"]["head.bias"], index["weight_map"]["norm.bias"] = list(parts)[::-1]
    index["weight_map"]["head.bias"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    wrong = scale.weigh("run/")
    assert (wrong.verdict, "head.bias" in wrong.reason) == ("quarantined", True)


def test_nan_is_rejected_by_name(scale: Scale) -> None:
    """The tensor and the count are named; the statistics stay."""
    make_checkpoint(scale.drops / "a.safetensors", nan=3)
    outcome = scale.weigh("a.safetensors")
    assert outcome.verdict == "rejected"
    assert outcome.reason == "head.weight has 3 non-finite values of 160 (NaN or Inf)"
    assert outcome.facts["evidence"] == {"bytes": True, "tensors": False, "program": False, "author_golden": False}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_weights_bind_by_the_recipe_not_by_fingerprint(scale: Scale, dtype: str) -> None:
    """Another dtype is another fingerprint; who names the template gets a bf16 program."""
    make_checkpoint(scale.drops / "a.safetensors", dtype=dtype)
    unnamed = scale.weigh("a.safetensors")
    assert unnamed.verdict == "needs_binding"
    assert f"the nearest is digits: differs: head.bias is {dtype}[10], not F32[10]" in unnamed.reason
    assert scale.weigh("a.safetensors", program=ProgramWish(template="digits")).verdict == "passed"
    make_checkpoint(scale.drops / "a.safetensors", dtype=dtype, nan=1)
    assert "head.weight has 1 non-finite value of" in scale.weigh("a.safetensors").reason


class Payload:
    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> Any:
        return (open, (str(self._sentinel), "w"))


GOOD = ("F32", [4], bytes(range(16)))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"PICKLE", "pickle"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (raw({"w": {"dtype": "F32", "shape": [1 << 36], "data_offsets": [0, 16]}}, bytes(16)), "its offsets span"),
        (raw({"w": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}), "needs_binding"),
        (raw(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{}}', b"x"), "there twice"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "larger than the limit of 100,000,000"),
        (safetensors({"w": GOOD})[:-1], "has"),
        (safetensors({"w": GOOD}) + b"x", "by its header"),
        (safetensors({}), "no tensors"),
        (b"", "bytes"),
    ],
)
def test_hostile_and_corrupt_files_are_quarantined(scale: Scale, tmp_path: Path, data: bytes, rule: str) -> None:
    """Each with the file and the rule in the reason, and nothing executed."""
    sentinel = tmp_path / "sentinel"
    path = scale.drops / "evil.safetensors"
    path.write_bytes(pickle.dumps(Payload(sentinel)) if data == b"PICKLE" else data)
    outcome = scale.weigh("evil.safetensors")
    if rule == "needs_binding":
        assert outcome.verdict == rule
    else:
        assert (outcome.verdict, rule in outcome.reason) == ("quarantined", True), outcome.reason
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("modeling.py", "open('sentinel', 'w')"),
        ("zero_to_fp32.py", "import torch"),
        ("__pycache__/modeling.cpython-311.pyc", "\0"),
        ("kernel.so", "\x7fELF"),
        ("train.ipynb", "{}"),
        ("config.json", '{"a": [{"auto_map": {"AutoModel": "modeling.M"}}]}'),
        ("config.json", "\n" * (5 << 20)),
        ("sub/conf.yaml", "model:\n  - _target_: os.system\n"),
        ("trainer_state.json", "[" * (5 << 20)),
        ("vocab.json", "x" * (5 << 20)),
        ("optimizer.pt", "\x80\x02."),
        ("training_args.bin", "\x80\x02."),
        ("scores.pkl", "\x80\x02."),
        ("README.md", "words"),
    ],
)
def test_what_nobody_uses_is_left_out_and_named(scale: Scale, name: str, text: str) -> None:
    """A sound checkpoint stays one, whatever lies beside it: that is neither read, kept nor run, and a note says so."""
    folder = scale.drops / "run"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    make_checkpoint(folder / "model.safetensors")
    (folder / name).write_text(text)
    outcome = scale.weigh("run/")
    assert outcome.verdict == "passed", outcome.reason
    assert outcome.facts["left_out"]["files"] == [{"path": name, "size": len(text.encode())}]
    (note,) = (one for one in outcome.facts["notes"] if name in one)
    assert note.startswith("left out of the artifact")
    code = name.endswith((".py", ".pyc", ".so", ".ipynb"))
    assert ("code, never stored nor run" in note) == code
    kept = {blob.digest for blob in scale.blobs.list()}
    assert digest_bytes(text.encode()) not in kept
    assert [file["path"] for file in outcome.facts["files"]] == ["model.safetensors"]


def test_what_changes_beside_the_weights_supersedes_nothing(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer goes on writing its log while its checkpoint is weighed."""
    (scale.drops / "run").mkdir()
    make_checkpoint(scale.drops / "run" / "model.safetensors")
    log = scale.drops / "run" / "trainer_state.json"
    log.write_text("{}")
    task = scale.task("run/")
    log.write_text("{ }")
    assert scale.run(task).verdict == "passed"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 0.3), byte=st.integers(0, 255), cut=st.sampled_from([0, 0, 0, 1, 500]), cast=st.booleans())
def test_any_damaged_file_gets_a_verdict(scale: Scale, at: float, byte: int, cut: int, cast: bool) -> None:
    """A flipped byte or a lost end never raises: whatever cannot be proven ends in a verdict with a reason."""
    data = bytearray(make_checkpoint(scale.drops / "a.safetensors").read_bytes())
    data[int(at * len(data))] = byte
    (scale.drops / "a.safetensors").write_bytes(data[: len(data) - cut])
    outcome = scale.weigh("a.safetensors", program=ProgramWish(template="digits") if cast else None)
    assert outcome.reason
    assert outcome.verdict in ("passed", "rejected", "quarantined", "needs_binding")
    assert not (cut and outcome.verdict == "passed")


def test_a_published_manifest_must_tell_the_truth(scale: Scale) -> None:
    """P0: the digests that the publisher wrote are those of the bytes."""
    folder = scale.drops / "run"
    folder.mkdir()
    data = make_checkpoint(folder / "model.safetensors").read_bytes()
    for digest, verdict in ((digest_bytes(data), "passed"), ("0" * 64, "quarantined")):
        file = PublishedFile(path="model.safetensors", size=len(data), digest=digest)
        (folder / "weighbridge.json").write_bytes(Published(files=(file,)).canonical())
        assert scale.weigh("run/").verdict == verdict


def test_the_authors_golden_decides(scale: Scale) -> None:
    """Outputs that match are evidence; outputs that do not reject, by name."""
    folder = scale.drops / "run"
    folder.mkdir()
    make_checkpoint(folder / "model.safetensors")
    first = scale.weigh("run/")
    reference = first.facts["golden"]["digest"]
    (folder / "golden.safetensors").write_bytes(scale.blobs.get(reference))
    outcome = scale.weigh("run/")
    assert outcome.verdict == "passed"
    assert outcome.facts["evidence"]["author_golden"]
    wrong = {
        n: v + np.float32(0.1) * n.startswith("output") for n, v in load_file(folder / "golden.safetensors").items()
    }
    (folder / "golden.safetensors").write_bytes(save(wrong))
    outcome = scale.weigh("run/")
    assert (outcome.verdict, outcome.facts["evidence"]["program"]) == ("rejected", True)
    assert outcome.reason.startswith("golden.safetensors: output logits differs by up to 0.1")
    (folder / "golden.safetensors").write_bytes(save({"input.x": np.zeros(1), "output.logits": np.zeros(1)}))
    assert "missing input pixels" in scale.weigh("run/").reason


def test_binding_needs_exactly_one_allowed_program(scale: Scale) -> None:
    """None, several, or one that the operator does not allow: the version says what to do."""
    make_checkpoint(scale.drops / "a.safetensors")
    make_checkpoint(scale.drops / "b.safetensors", extra=np.zeros(3, np.float32))
    assert "unexpected extra" in scale.weigh("b.safetensors").reason
    twins = Programs((scale.template, replace(scale.template, name="twin")))
    several = scale.weigh("a.safetensors", programs=twins)
    assert (several.verdict, "digits, twin" in several.reason) == ("needs_binding", True)
    assert scale.weigh("a.safetensors", programs=twins, program=ProgramWish(template="twin")).verdict == "passed"
    assert scale.weigh("a.safetensors", programs=replace(twins, allowed=("template:t*",))).verdict == "passed"
    for wish in (ProgramWish(template="digits"), ProgramWish(factory="os:system"), ProgramWish(template="none")):
        outcome = scale.weigh("a.safetensors", programs=Programs((scale.template,), ("template:n*",)), program=wish)
        assert outcome.verdict == "needs_binding"


def test_a_factory_that_the_operator_allows(scale: Scale) -> None:
    """An installed module builds the program; the recipe says what goes in and out."""
    make_checkpoint(scale.drops / "a.safetensors")
    wish = {"program": ProgramWish(factory="fixtures.engines:small_mlp")}
    contract = {"inputs": scale.template.inputs, "outputs": scale.template.outputs}
    programs = Programs((), ("factory:fixtures.*:*",))
    assert scale.weigh("a.safetensors", programs=programs, **wish, **contract).verdict == "passed"
    assert "needs inputs and outputs" in scale.weigh("a.safetensors", programs=programs, **wish).reason


def test_a_file_that_changes_under_the_job_is_superseded(scale: Scale) -> None:
    """The pin no longer holds: nothing is mixed, the new content is another version's business."""
    path = make_checkpoint(scale.drops / "a.safetensors")
    task = scale.task("a.safetensors")
    make_checkpoint(path, seed=2)
    assert scale.run(task).verdict == "superseded"
    path.unlink()
    assert scale.run(task).verdict == "superseded"


def test_an_object_that_is_overwritten_while_its_old_bytes_are_read_is_superseded(scale: Scale) -> None:
    """An object store ends a stream with the bytes it began with; the change is noticed all the same."""
    store = MemoryStore("overwritten")
    store.put("a.safetensors", save(weights(1)))
    files = tuple(pin(info) for info in store.list())
    task = ValidateTask("digits", 1, "a.safetensors", files, programs=scale.programs)

    def again(_: int) -> None:
        store.put("a.safetensors", save(weights(2)))

    class Streaming(MemoryStore):
        """As S3: what is open goes on to its end."""

        def open(self, key: str, **limits: Any) -> IO[bytes]:
            return io.BytesIO(store.get(key, **limits))

        def get(self, key: str, **limits: Any) -> bytes:
            return store.get(key, **limits)

    run = partial(validate, task, source=Streaming("as s3"), blobs=scale.blobs, cache=scale.path)
    assert run().verdict == "passed"
    assert run(progress=again).verdict == "superseded"

    store.put("a.safetensors", save(weights(1)))
    task = replace(task, files=tuple(pin(info) for info in store.list()))
    gone = partial(validate, task, source=Streaming("as s3"), blobs=scale.blobs, cache=scale.path)
    assert gone(progress=lambda _: store.delete("a.safetensors")).verdict == "passed", "its bytes were read whole"


def test_the_stage_runs_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m weighbridge.workers.validate` prints the verdict as JSON."""
    path = make_checkpoint(tmp_path / "a.safetensors")
    arguments = ["--factory", "fixtures.engines:small_mlp", "--input", "pixels:FP32:-1,64", "--output", "logits"]
    assert main([str(path), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "passed"


class Sure(torch.nn.Module):
    """Answers hardly depend on the weights: a class that any weights give, and a number that no weights change."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.head(pixels) * 1e-9, -1)


class Small(torch.nn.Module):
    """Probabilities of 200 classes, each about 0.005."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 32), torch.nn.Linear(32, 200)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.b(torch.relu(self.a(pixels))), -1)


def _drop(
    scale: Scale, module: torch.nn.Module, answers: torch.nn.Module, dtype: torch.dtype, rows: int = 8
) -> Outcome:
    """Weigh `module`'s weights in a dtype, with a golden that `answers` gave."""
    made = template.build(module.eval(), INPUTS, ["p"])
    scale.blobs.put_bytes(made.pt2)
    info = TemplateInfo("p", made.digest, made.fingerprint, made.parameters, made.inputs, made.outputs)
    folder = scale.drops / "run"
    folder.mkdir(exist_ok=True)
    save_torch({name: one.to(dtype) for name, one in module.state_dict().items()}, folder / "model.safetensors")
    pixels = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        save_torch({"input.pixels": pixels, "output.p": answers(pixels)}, folder / "golden.safetensors")
    return scale.weigh("run/", programs=Programs((info,)), program=ProgramWish(template="p"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_golden_of_other_weights_rejects_however_small_its_outputs(scale: Scale, dtype: torch.dtype) -> None:
    """Tolerances scale with what varies, in every dtype; the author's own golden passes, recorded in float32."""
    torch.manual_seed(1)
    mine, other = Small(), Small()
    assert _drop(scale, mine, other, dtype).reason.startswith("golden.safetensors: output p differs by up to 0.0")
    outcome = _drop(scale, mine, mine, dtype)
    assert (outcome.verdict, outcome.facts["evidence"]["author_golden"]) == ("passed", True), outcome.reason
    assert outcome.facts["golden"]["spread"] > 0


def test_a_golden_that_other_weights_pass_proves_nothing(scale: Scale) -> None:
    """It counts as no evidence, and reason and notes say why; nor is the reference golden of such a program a proof."""
    torch.manual_seed(1)
    mine = Sure()
    outcome = _drop(scale, mine, mine, torch.float32)
    assert (outcome.verdict, outcome.facts["evidence"]["author_golden"]) == ("passed", False)
    assert outcome.reason.endswith("golden.safetensors proves nothing: other weights pass it too")
    assert [note.partition(" proves nothing")[0] for note in outcome.facts["notes"]] == [
        "the reference golden, on synthetic inputs,",
        "golden.safetensors",
    ]


def test_weights_too_large_to_change_are_said(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not tried in full is no verdict on the author's golden."""
    monkeypatch.setattr(proving, "replace_weights", lambda module, turn: (0, 2))
    torch.manual_seed(1)
    outcome = _drop(scale, mine := Small(), mine, torch.float32)
    assert outcome.facts["evidence"]["author_golden"]
    assert "golden.safetensors was tried with 0 of 2 weights changed only" in outcome.facts["notes"]


def test_a_golden_on_which_the_program_fails_is_the_goldens_fault(scale: Scale) -> None:
    """A token beyond the vocabulary says nothing against the weights."""
    tokens = (TensorSpec(name="tokens", datatype="INT64", shape=(-1, 3)),)
    made = template.build(torch.nn.Embedding(10, 4).eval(), tokens, ["p"])
    scale.blobs.put_bytes(made.pt2)
    info = TemplateInfo("p", made.digest, made.fingerprint, made.parameters, made.inputs, made.outputs)
    folder = scale.drops / "run"
    folder.mkdir()
    save_torch({"weight": torch.randn(10, 4)}, folder / "model.safetensors")
    beyond = torch.full((2, 3), 10)
    save_torch({"input.tokens": beyond, "output.p": torch.zeros(2, 3, 4)}, folder / "golden.safetensors")
    outcome = scale.weigh("run/", programs=Programs((info,)))
    assert outcome.verdict == "rejected"
    assert outcome.reason.startswith("golden.safetensors: ")
