"""The stage *validate*: what is proven of a checkpoint before anything serves it. No Celery, no SQL.

Evidence grows in this order, and a verdict ends it: `bytes` (digests, structure), `tensors` (finite), `program` (bound,
loaded, runs), `author_golden` (it answers as its author says). What passes becomes an artifact: content-addressed
weights under a manifest, with the reference golden that hosts check.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from weighbridge import terminal
from weighbridge.engines import golden, purity, tensors
from weighbridge.engines.binding import ties
from weighbridge.engines.errors import EngineError, GoldenMismatch, ImpureProgram, InvalidInput, LoadError
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Golden, Manifest, TensorSpec
from weighbridge.engines.protocols import BlobPath, Session
from weighbridge.engines.spread import Tolerance
from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.registry.recipe import Gate, ProgramWish
from weighbridge.registry.schemas import GateResult
from weighbridge.storage import companions, identity
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import DigestMismatch, ObjectNotFound, PreconditionFailed, StorageError
from weighbridge.storage.protocols import Get, Ref
from weighbridge.words import counted
from weighbridge.workers import bindings, checkpoint, proving, weights, zero_tails
from weighbridge.workers.bindings import Bound, Programs, TemplateInfo
from weighbridge.workers.checkpoint import Contents
from weighbridge.workers.desk import Desk, OwnDesk, Phase
from weighbridge.workers.ours import raise_ours
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.zero_tails import Before

__all__ = ["Programs", "TemplateInfo", "ValidateTask", "quarantined", "validate", "weigh"]

_LISTED = 20
"""How many tensors a list in the facts names."""
_AUTHOR = "author"
_GOLDENS = {_AUTHOR: "golden.safetensors", "reference": "the reference golden, on synthetic inputs,"}
ENGINE = {"name": "torch", "minimum": "2.8"}


@dataclass(frozen=True)
class ValidateTask:
    """One version's original. `path` is the checkpoint's key, or its folder ending in `/`; `files` are its pins."""

    model: str
    version: int
    path: str
    files: tuple[Ref, ...]
    proof: str = ""
    program: ProgramWish | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    """A factory's contract, from the recipe; templates carry their own."""
    programs: Programs = field(default_factory=Programs)
    device: str = "cpu"
    gates: tuple[Gate, ...] = ()
    """The recipe's; those on tensors are judged here."""
    evaluated: bool = False
    """Whether an evaluation set will judge it."""
    before: Before | None = None
    """What its predecessor had of zeros."""


def validate(
    task: ValidateTask,
    *,
    source: Get,
    blobs: Blobs,
    cache: BlobPath,
    progress: Callable[[float], None] = lambda _: None,
) -> Outcome:
    """Weigh a checkpoint of `source` right here, as `weigh` does; `cache` gives a blob of `blobs` as a local file.

    `progress` is called with the share done, 0 to 1.
    """
    return weigh(task, OwnDesk(source, blobs, cache, Path(tempfile.gettempdir()), progress, task.files))


def weigh(task: ValidateTask, desk: Desk) -> Outcome:
    """Weigh a checkpoint; its weights, golden and manifest become blobs of the desk.

    Raises only what a retry can cure (StorageUnavailable, StorageFull, a blob that is not there yet), and what is wrong
    with this machine.
    """
    try:
        contents = checkpoint.read(desk, task.path, task.files, desk.take)
        desk.enter(Phase.RUNNING)
        outcome = _weigh(task, contents, desk)
        _prove_unchanged(desk, [ref for ref in task.files if ref not in contents.left_out.values()])
    except checkpoint.Unsafe as wrong:
        return quarantined(task, desk, str(wrong))
    except (PreconditionFailed, ObjectNotFound) as gone:
        return _superseded(gone)
    return outcome


def quarantined(task: ValidateTask, desk: Desk, reason: str) -> Outcome:
    """Not safe to be looked into; its weights are told from others all the same, so that nothing brings it back."""
    try:
        weights = desk.digest(identity.weights(task.files))
    except (PreconditionFailed, ObjectNotFound) as gone:
        return _superseded(gone)
    return Outcome.quarantined(reason, {"evidence": _evidence(), "weights": weights})


def _superseded(gone: StorageError) -> Outcome:
    what = "was deleted" if isinstance(gone, ObjectNotFound) else "changed"
    return Outcome.superseded(f"the content {what} before it was safe in the artifact store: {gone}")


def _prove_unchanged(source: Get, files: Sequence[Ref]) -> None:
    """Raise PreconditionFailed when what was read is no longer what was pinned: the newer content is another version.

    A stream that an object store began before the change ends with the old bytes, and tells nobody. A file that was
    removed meanwhile is no change: its bytes are safe by now.
    """
    for ref in files:
        if ref.size:
            with suppress(ObjectNotFound):
                source.get(ref.key, end=1, if_match=ref)


def _weigh(task: ValidateTask, contents: Contents, desk: Desk) -> Outcome:
    """The verdict on bytes that are whole and kept."""
    facts = _facts(contents)
    bound: Bound | None = None
    why = ""
    try:
        bound = bindings.find(contents.tensors, task.programs, task.program, task.inputs, task.outputs)
    except bindings.Unbound as none:
        why = str(none)
    nonfinite = [one for one in contents.stats if one.nonfinite]
    if bad := [one for one in nonfinite if not weights.is_meant(one, bound, contents, desk.path)]:
        facts["evidence"] = _evidence("bytes")
        return Outcome.rejected(_nonfinite(bad), facts)
    facts["evidence"] = _evidence("bytes", "tensors")
    results = _judge_zeros(task, contents, facts)
    if failed := [one.reason for one in results if one.verdict == "failed"]:
        return Outcome.rejected("; ".join(failed), facts, gates=results)
    if bound is not None:
        why = weights.ignored(bound, contents, desk.path)
    if bound is None or why:
        return Outcome.needs_binding(why, facts)
    return replace(_prove_program(task, contents, bound, facts, desk), gates=results)


def _judge_zeros(task: ValidateTask, contents: Contents, facts: dict[str, Any]) -> list[GateResult]:
    """Note zeros where bytes may be missing, and judge them by the gates."""
    before = zero_tails.comparable(task.before, contents.stats)
    findings = zero_tails.find(contents.stats, before)
    results = zero_tails.judge(findings, task.gates, evaluated=task.evaluated, before=before)
    if findings:
        facts["notes"] = [*facts["notes"], zero_tails.note(findings, before)]
        facts["tensors"]["zero_tail"] = {one.tensor: one.size for one in findings[:_LISTED]}
    facts["unfinished"] = zero_tails.left_to_set(results)
    return results


def _prove_program(task: ValidateTask, contents: Contents, bound: Bound, facts: dict[str, Any], desk: Desk) -> Outcome:
    tolerance = golden.tolerance([one.dtype for one in contents.stats])
    draft = _manifest(contents, bound, Golden(digest="0" * 64, size=0, **tolerance._asdict()))
    program = f"{bound.program.kind}:{bound.program.name}"
    factories = (bound.program.name,) if bound.program.kind == "factory" else ()
    try:
        if bound.program.digest is not None:
            desk.path(bound.program.digest)
    except (ObjectNotFound, DigestMismatch) as damaged:
        return Outcome.needs_binding(f"{program} is damaged in the store, add it again: {damaged}", facts)
    try:
        session = load(draft, desk.path, task.device, factories)
    except LoadError as exc:
        raise_ours(exc)
        return Outcome.needs_binding(f"{program} does not load: {exc}", facts)
    try:
        _must_be_pure(session)
        reference = golden.make_reference(session)
        golden.check(session, reference, *tolerance)
        facts["evidence"] = _evidence("bytes", "tensors", "program")
        if wrong := _author(session, contents.golden, tolerance):
            return Outcome.rejected(wrong, facts)
        goldens = {"reference": reference} | ({_AUTHOR: contents.golden} if contents.golden is not None else {})
        weak = proving.worthless(session, goldens, tolerance)
    except ImpureProgram as exc:
        return Outcome.rejected(f"{program} is no pure function: {exc}", facts)
    except InvalidInput as exc:
        return Outcome.needs_binding(f"{program} cannot be proven, whatever the weights are: {exc}", facts)
    except EngineError as exc:
        raise_ours(exc)
        return Outcome.rejected(f"{program} fails with these weights: {exc}", facts)
    finally:
        session.close()
    facts["evidence"]["author_golden"] = contents.golden is not None and weak.get(_AUTHOR) != proving.NOTHING
    kept = desk.put_bytes(reference)
    manifest = _manifest(contents, bound, Golden(digest=kept.digest, size=kept.size, **tolerance._asdict()))
    stored = desk.put_bytes(manifest.canonical())
    facts |= {
        "artifact_digest": stored.digest,
        "blobs": manifest.blobs() | {stored.digest: stored.size},
        "program": bound.program.model_dump(mode="json"),
        "bound": len(bound.binding),
        "golden": manifest.golden.model_dump(mode="json"),
        "precision": weights.precision(contents, bound),
        "unread": weights.unread(bound),
        "notes": [*facts["notes"], *bound.notes, *(f"{_GOLDENS[name]} {said}" for name, said in weak.items())],
    }
    proven = ", author's golden matches" if facts["evidence"]["author_golden"] else ""
    if weak.get(_AUTHOR) == proving.NOTHING:
        proven = f", {_GOLDENS[_AUTHOR]} {proving.NOTHING}"
    count = counted(len(contents.stats), "tensor")
    return Outcome.passed(f"{count}, finite, bound to {bound.program.kind}:{bound.program.name}{proven}", facts)


def _must_be_pure(session: Session) -> None:
    """Ask with the real weights what `template add` asked. Raises ImpureProgram."""
    first, second = (tensors.synthetic(session.inputs, size=3, seed=seed) for seed in (1, 2))
    purity.ask(session.infer, first, second, getattr(session, "module", None))
    purity.ask_rows(session.infer, session.inputs, first)


def _author(session: Session, data: bytes | None, tolerance: Tolerance) -> str | None:
    """Why the author's golden rejects the version, if it does."""
    if data is None:
        return None
    try:
        golden.check(session, data, *tolerance)
    except (GoldenMismatch, InvalidInput) as exc:
        return f"golden.safetensors: {exc}"
    except EngineError as exc:
        raise_ours(exc)
        return f"golden.safetensors: the program fails on its inputs: {exc}"
    return None


def _manifest(contents: Contents, bound: Bound, reference: Golden) -> Manifest:
    return Manifest(
        variant="original",
        files=tuple(sorted(contents.weights, key=lambda file: file.path)),
        program=bound.program,
        binding=bound.binding,
        inputs=bound.inputs,
        outputs=bound.outputs,
        golden=reference,
        engine=ENGINE,
        ties=ties(bound.binding, bound.parameters),
    )


def _evidence(*proven: str) -> dict[str, bool]:
    return {name: name in proven for name in ("bytes", "tensors", "program", "author_golden")}


def _facts(contents: Contents) -> dict[str, Any]:
    stats = contents.stats
    largest = sorted(stats, key=lambda one: (-one.nbytes, one.name))[:_LISTED]
    left_out = contents.left_out
    return {
        "notes": [note] if (note := companions.note(left_out)) else [],
        "left_out": {
            "count": len(left_out),
            "bytes": sum(ref.size for ref in left_out.values()),
            "files": [{"path": path, "size": left_out[path].size} for path in sorted(left_out)[:_LISTED]],
        },
        "source_digest": contents.source_digest,
        "weights": contents.weights_digest,
        "files": [file.model_dump(mode="json") for file in contents.files],
        "tensors": {
            "count": len(stats),
            "bytes": sum(one.nbytes for one in stats),
            "elements": sum(one.count for one in stats),
            "dtypes": dict(sorted(Counter(one.dtype for one in stats).items())),
            "zero": [one.name for one in stats if one.count and one.zeros == one.count][:_LISTED],
            "constant": [one.name for one in stats if one.constant][:_LISTED],
            "largest": [_row(one) for one in largest],
            "zeros": zero_tails.facts(stats),
        },
    }


def _row(one: TensorStats) -> dict[str, Any]:
    fraction = one.zeros / one.count if one.count else 0.0
    row = asdict(one) | {"shape": list(one.shape), "zeros": round(fraction, 6)}
    for place in ("offset", "last", "zero_tail", "hole"):
        del row[place]
    return {key: value for key, value in row.items() if not (value is None or value == math.inf)}


def _nonfinite(bad: Sequence[TensorStats]) -> str:
    first = max(bad, key=lambda one: one.nonfinite)
    others = f", and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    values = counted(first.nonfinite, "non-finite value")
    return f"{first.name} has {values} of {first.count:,} (NaN or Inf){others}"


def main(argv: Sequence[str] | None = None) -> int:
    """Weigh a local file or folder: `python -m weighbridge.workers.validate PATH --factory FILE.py:NAME --input …`."""
    from weighbridge.engines.factory import load_factory
    from weighbridge.engines.template import build
    from weighbridge.storage.in_place import InPlace
    from weighbridge.storage.pins import pin
    from weighbridge.storage.urls import open_store

    parser = terminal.Arguments(prog="weighbridge.workers.validate", description=main.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--factory", required=True, help="trusted code: package.module:name or FILE.py:name")
    parser.add_argument("--input", action="append", required=True, metavar="NAME:FP32:-1,64", help="one per input")
    parser.add_argument("--output", action="append", metavar="NAME", help="one per output")
    args = parser.parse_args(argv)
    made = build(load_factory(args.factory)(), [_spec(text) for text in args.input], args.output or ["output"])
    template = TemplateInfo("given", made.digest, made.fingerprint, made.parameters, made.inputs, made.outputs)
    where = args.path.resolve()
    source = open_store(where.parent.as_uri())
    path = f"{where.name}/" if where.is_dir() else where.name
    files = tuple(pin(info) for info in source.list(path))
    with tempfile.TemporaryDirectory() as folder:
        blobs = Blobs(open_store(Path(folder).as_uri()))
        blobs.put_bytes(made.pt2)
        task = ValidateTask("local", 1, path, files, programs=Programs((template,)))
        outcome = validate(task, source=source, blobs=blobs, cache=InPlace(blobs).path)
    print(json.dumps({"verdict": outcome.verdict, "reason": outcome.reason, "facts": outcome.facts}, indent=2))
    return 0 if outcome.verdict == "passed" else 1


def _spec(text: str) -> TensorSpec:
    name, datatype, shape = text.split(":")
    return TensorSpec(name=name, datatype=datatype, shape=tuple(int(length) for length in shape.split(",")))


if __name__ == "__main__":
    terminal.run("weighbridge.workers.validate", main)
