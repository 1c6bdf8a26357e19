"""Versions on both databases: recorded once, judged by their jobs, opened again, put away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fixtures.registry import record, work
from sqlalchemy import delete, text
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from weighbridge.registry import archiving, artifacts, checkpoints, events, jobs, judging, rollouts, templates, versions
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import Conflict, Invalid, InvalidRecipe, NotFound
from weighbridge.registry.judging import Judges
from weighbridge.registry.lifecycle import JobState, Stage, Verdict
from weighbridge.registry.models import Alias, Event, Job, Recipe, Rollout, Version
from weighbridge.registry.recipe import Policy
from weighbridge.registry.schemas import GateResult, Metric
from weighbridge.storage.protocols import Ref

FAST = "lane: fast\n"


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the versions asked of the rollouts, in order."""
    asked: list[str] = []

    def start_automatic(tx: Session, model_id: int, policies: object = ()) -> None:
        asked.append("start")

    def withdraw(tx: Session, version: Version, reason: str) -> None:
        asked.append(f"withdraw {version.number}: {reason}")

    monkeypatch.setattr(rollouts, "start_automatic", start_automatic)
    monkeypatch.setattr(rollouts, "withdraw", withdraw)
    return asked


def recorded(database: Database, name: str = "a", **changes: object) -> versions.Recorded:
    with database.transaction() as tx:
        return record(tx, name, **changes)


def run(database: Database, job_id: int | None, verdict: Verdict = Verdict.PASSED, reason: str = "fine") -> int | None:
    """Do a job; return the id of the next one."""
    with database.transaction() as tx:
        return next(iter(work(tx, job_id, verdict, reason)), None)


def look(database: Database, selector: int | str = 1, model: str = "digits") -> Version:
    with database.read() as tx:
        return versions.get(tx, model, selector)


def kinds(database: Database) -> list[str]:
    with database.read() as tx:
        return list(tx.scalars(select(Event.kind).order_by(col(Event.id))))


def test_recording_writes_everything_at_once(database: Database) -> None:
    """Version, pinned files, checkpoint, first job and event are there together, or none of them."""
    eval_pin = Ref("digits/eval.safetensors", 10, "eval", "v1", "2026-01-01T00:00:00+00:00")
    train_pin = Ref("digits/train.safetensors", 20, "train", "v2", "2026-01-01T00:00:00+00:00")
    result = recorded(database, "a", eval_pin=eval_pin, train_pin=train_pin, unproven=True)
    assert result.created
    assert [(job.key, job.queue, job.state) for job in result.jobs] == [("version:1:validate:1", "cpu", "queued")]
    version = look(database)
    assert (version.number, version.status, version.size, version.unproven) == (1, "discovered", 64, True)
    assert version.eval_pin is not None
    assert Ref(**version.eval_pin) == eval_pin
    assert version.train_pin is not None
    assert Ref(**version.train_pin) == train_pin
    with database.read() as tx:
        assert [(file.key, file.etag) for file in versions.files(tx, 1)] == [("digits/a.safetensors", "etag-a")]
        checkpoint = checkpoints.lookup(tx, "digits", "a.safetensors")
        assert checkpoint is not None
        assert (checkpoint.state, checkpoint.seen, checkpoint.id) == ("complete", "seen-a", version.checkpoint_id)
    assert kinds(database) == ["model.created", "recipe.changed", "version.recorded"]


def test_the_same_pins_are_the_same_version(database: Database) -> None:
    """A checkpoint seen twice is one version, also after it waited again in between."""
    first = recorded(database)
    with database.transaction() as tx:
        checkpoints.waiting(tx, "digits", "a.safetensors", reason="being written", seen="other")
    second = recorded(database)
    assert (second.created, second.version.id, second.jobs) == (False, first.version.id, [])
    with database.read() as tx:
        assert [state for *_, state in checkpoints.seen(tx)] == ["complete"]


def test_racing_recorders_make_one_version_of_one_checkpoint(
    database: Database, open_again: Callable[[], Database]
) -> None:
    """Daemons that see the same first checkpoint of a new model at the same moment record it once."""
    start, processes = threading.Barrier(6), [open_again() for _ in range(3)]

    def race(number: int) -> versions.Recorded:
        start.wait(10)
        return recorded(processes[number % 3])

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(race, range(6)))
    assert sorted(result.created for result in results) == [False] * 5 + [True]
    assert {result.version.number for result in results} == {1}


def test_racing_recorders_never_share_a_number(database: Database, open_again: Callable[[], Database]) -> None:
    """Numbers are 1, 2, 3… without a gap or a double, whoever records."""
    processes = [open_again() for _ in range(3)]

    def race(number: int) -> int:
        return recorded(processes[number % 3], f"checkpoint-{number}").version.number

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(race, range(30))) == list(range(1, 31))


def test_a_number_is_never_used_again(database: Database) -> None:
    """Also when the highest version was deleted by hand, the next gets a new number."""
    recorded(database, "a")
    highest = recorded(database, "b").version
    with database.transaction() as tx:
        tx.execute(text("DELETE FROM checkpoint_file"))
        tx.execute(delete(Version).where(col(Version.id) == highest.id))
    assert recorded(database, "c").version.number == 3


def test_wrong_content_is_quarantined_at_once(database: Database) -> None:
    """What can never become right is a version with the reason, and no job."""
    result = recorded(database, refused="a pickle named .safetensors")
    assert result.jobs == []
    version = look(database)
    assert (version.status, version.reason) == ("quarantined", "a pickle named .safetensors")
    assert kinds(database)[-2:] == ["version.recorded", "version.quarantined"]


def test_an_invalid_recipe_records_nothing(database: Database) -> None:
    """The error names line and field; the caller notes that the checkpoint waits."""
    with pytest.raises(InvalidRecipe, match=r"recipe.yaml line 2: lane: Input should be 'standard' or 'fast'"):
        recorded(database, recipe_text="gates: []\nlane: quick\n")
    with pytest.raises(NotFound, match="no model digits"):
        look(database)
    with database.transaction() as tx:
        checkpoints.waiting(tx, "digits", "a.safetensors", reason="recipe.yaml line 2: …", seen="seen-a")
    assert kinds(database) == ["checkpoint.waiting"]


def test_what_the_policy_overrules_is_reported_once(database: Database) -> None:
    """A recipe in the bucket that asks for more than the operator allows changes nothing and is an event."""
    greedy = "rollout: {automatic: true, max_error_rate: 0.5}\ngates: [{metric: accuracy, min: 0.1}]\n"
    strict = Policy(automatic=False, max_error_rate=0.02, gates=({"metric": "accuracy", "min": 0.9},))  # type: ignore[arg-type]
    for name in ("a", "b"):
        recorded(database, name, recipe_text=greedy, policy=strict)
    with database.read() as tx:
        (recipe,) = tx.scalars(select(Recipe)).all()
        (event,) = tx.scalars(select(Event).where(col(Event.kind) == "recipe.overruled")).all()
    assert recipe.effective["rollout"]["automatic"] is False
    assert recipe.effective["rollout"]["max_error_rate"] == 0.02
    assert recipe.effective["gates"][0]["min"] == 0.9
    assert event.after["ignored"] == recipe.ignored
    assert "rollout.automatic: True is overruled by the policy (automatic = false)" in recipe.ignored
    assert "gates.accuracy.min: 0.1 is overruled by the policy (min = 0.9)" in recipe.ignored


def test_a_version_keeps_the_recipe_it_was_recorded_with(database: Database) -> None:
    """A later revision judges later versions; going back to an earlier text is the earlier revision."""
    pinned = [
        recorded(database, name, recipe_text=recipe).version.recipe_id
        for name, recipe in (("a", None), ("b", FAST), ("c", ""), ("d", FAST))
    ]
    assert len(set(pinned)) == 3
    assert pinned[1] == pinned[3]


def test_the_standard_lane(database: Database, fleet: list[str]) -> None:
    """Validated, then evaluated, then ready; becoming ready asks for a rollout once."""
    validate = recorded(database).jobs[0].id
    with database.transaction() as tx:
        artifacts.store_artifact(tx, 1, artifact_digest="aa", blobs={"bb": 64})
    evaluate = run(database, validate)
    assert look(database).status == "discovered"
    assert fleet == []
    assert run(database, evaluate, reason="accuracy 0.97") is None
    version = look(database)
    assert (version.status, version.reason, fleet) == ("ready", "accuracy 0.97", ["start"])
    assert version.ready_at is not None
    with database.read() as tx:
        assert artifacts.find_variant(tx, 1).status == "ready"
    assert kinds(database)[-1] == "version.ready"


def test_the_fast_lane(database: Database, fleet: list[str]) -> None:
    """Ready after validation; a failed evaluation behind the rollout takes the version back."""
    evaluate = run(database, recorded(database, recipe_text=FAST).jobs[0].id)
    assert (look(database).status, fleet) == ("ready", ["start"])
    run(database, evaluate, Verdict.REJECTED, "accuracy 0.71 < 0.90")
    assert look(database).status == "rejected"
    assert fleet == ["start", "withdraw 1: accuracy 0.71 < 0.90"]


@pytest.mark.parametrize("verdict", ["rejected", "quarantined", "needs_binding", "superseded"])
def test_a_verdict_ends_the_judgement(database: Database, fleet: list[str], verdict: str) -> None:
    """The version is what validation says of it; nothing more runs, and no fleet hears of it."""
    assert run(database, recorded(database).jobs[0].id, Verdict(verdict), "because") is None
    version = look(database)
    assert (version.status, version.reason, fleet) == (verdict, "because", [])


def test_a_validation_that_ends_its_workers_is_no_verdict(database: Database) -> None:
    """The version says so and stays as it is, served nowhere; nobody looks again, until a person has it judged anew."""
    job_id = recorded(database).jobs[0].id
    assert job_id is not None
    for _ in range(2):
        with database.transaction() as tx:
            assert jobs.claim(tx, job_id, "crashing", -1) is not None
            assert versions.overdue(tx) == []
            jobs.expire(tx)
    with database.transaction() as tx:
        assert versions.overdue(tx) == [1]
        versions.advance(tx, 1, actor="reconcile", policies=())
    with database.read() as tx:
        assert versions.overdue(tx) == []
    version = look(database)
    assert version.status == "discovered"
    assert version.reason.startswith("validate did not finish: set aside: 2 workers ended in the middle of it")
    with database.read() as tx:
        assert list(tx.scalars(select(col(Version.number)).where(versions.set_aside()))) == [1]
    rejudge(database)
    with pytest.raises(Conflict, match="is being judged"):
        rejudge(database)
    version = look(database)
    assert (version.status, version.reason, version.judgement) == ("discovered", "", 2)
    assert run(database, jobs_of(database)[-1]) is not None


def test_used_up_attempts_fail_closed(database: Database) -> None:
    """A version whose validation failed each time is found by the reconcile loop and quarantined."""
    job_id = recorded(database).jobs[0].id
    assert job_id is not None
    for _ in range(3):
        with database.transaction() as tx:
            claim = jobs.claim(tx, job_id, "worker", 30)
            assert claim is not None
            jobs.retry(tx, claim, "a mistake", 0)
    with database.transaction() as tx:
        assert versions.overdue(tx) == [1]
        versions.advance(tx, 1, actor="reconcile", policies=())
        assert versions.overdue(tx) == []
    version = look(database)
    assert (version.status, version.reason) == ("quarantined", "validate did not finish: a mistake")


def jobs_of(database: Database) -> list[int]:
    with database.read() as tx:
        return [job.id or 0 for job in jobs.of(tx, "version", 1)]


def test_a_fast_evaluation_that_never_finishes_fails_closed(database: Database, fleet: list[str]) -> None:
    """The version is ready meanwhile; when the job is set aside it is found, rejected and withdrawn."""
    evaluate = run(database, recorded(database, recipe_text=FAST).jobs[0].id)
    for _ in range(2):
        with database.transaction() as tx:
            assert versions.overdue(tx) == []
            assert jobs.claim(tx, evaluate or 0, "crashing", -1) is not None
            jobs.expire(tx)
    with database.transaction() as tx:
        assert versions.overdue(tx) == [1]
        versions.advance(tx, 1, actor="reconcile", policies=())
        assert versions.overdue(tx) == []
    assert look(database).status == "rejected"
    assert fleet[0] == "start"
    assert fleet[1].startswith("withdraw 1: evaluate did not finish: set aside: 2 workers ended")


def test_a_version_without_evaluation_set_is_not_overdue(database: Database, fleet: list[str]) -> None:
    """What does not apply holds nothing back, and is not looked at again."""
    run(database, run(database, recorded(database).jobs[0].id), Verdict.NOT_APPLICABLE, "no evaluation set")
    assert (look(database).status, look(database).reason) == ("ready", "no evaluation set")
    with database.read() as tx:
        assert versions.overdue(tx) == []


def test_two_last_jobs_that_finish_together(database: Database, fleet: list[str]) -> None:
    """Each transaction sees the other's job open until it commits; under the row lock the later one sees both done."""
    validate = recorded(database).jobs[0].id
    with database.transaction() as tx:
        evaluate = jobs.insert(
            tx, key="version:1:evaluate:1", subject_type="version", subject_id=1, stage=Stage.EVALUATE
        )
        assert evaluate is not None
    with database.transaction() as tx:
        claims = [jobs.claim(tx, job_id or 0, "worker", 30) for job_id in (validate, evaluate.id)]
    both_finished = threading.Barrier(2)

    def end(claim: jobs.Claim | None) -> None:
        assert claim is not None
        with database.transaction() as tx:
            jobs.finish(tx, claim, Verdict.PASSED, "fine", {})
            if database.dialect == "postgresql":  # On SQLite one transaction waits for the other as a whole.
                both_finished.wait(10)
            versions.advance(tx, 1, actor="worker", policies=())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(end, claims))
    assert (look(database).status, fleet) == ("ready", ["start"])


def test_advancing_again_changes_nothing(database: Database, fleet: list[str]) -> None:
    """The reconcile loop runs the same plan as the worker: events, jobs and revision stay as they are."""
    run(database, run(database, recorded(database).jobs[0].id))
    before = (look(database).revision, kinds(database))
    with database.transaction() as tx:
        assert versions.advance(tx, 1, actor="reconcile", policies=()) == []
    assert (look(database).revision, kinds(database)) == before
    assert fleet == ["start"]


def test_a_lost_plan_is_made_up_for(database: Database) -> None:
    """A job that was finished without what follows from it is found, and the next job is inserted."""
    job_id = recorded(database).jobs[0].id
    with database.transaction() as tx:
        claim = jobs.claim(tx, job_id or 0, "worker", 30)
        assert claim is not None
        jobs.finish(tx, claim, Verdict.PASSED, "fine", {})
        assert versions.overdue(tx) == [1]
        assert [job.stage for job in versions.advance(tx, 1, actor="reconcile", policies=())] == ["evaluate"]
        assert versions.overdue(tx) == []


def test_a_new_judgement_runs_new_jobs(database: Database) -> None:
    """Rejudging opens an ended version without pins; whoever validates it pins what lies there, once."""
    run(database, recorded(database, "a", recipe_text=FAST).jobs[0].id, Verdict.REJECTED, "non-finite values")
    with database.transaction() as tx:
        (job,) = versions.rejudge(tx, "digits", 1, actor="ada", reason="fixed the gate")
        assert job.key == "version:1:validate:2"
    version = look(database)
    pins = (version.recipe_id, version.eval_pin, version.train_pin)
    assert (version.status, version.judgement, pins) == ("discovered", 2, (None, None, None))
    newer = Judges("gates: []", Ref("digits/eval.safetensors", 10, "newer"), Ref("digits/train.safetensors", 9, "t"))
    for judgement, there in ((1, Judges(FAST)), (2, newer), (2, Judges())):  # a fenced-out attempt, ours, a late one
        with database.transaction() as tx:
            judging.pin(tx, 1, judgement, there, Policy())
    version = look(database)
    with database.read() as tx:
        recipe = versions.judged_by(tx, version)
    assert recipe is not None
    assert recipe.text == "gates: []"
    assert (version.eval_pin or {})["etag"] == "newer"
    assert (version.train_pin or {})["etag"] == "t"
    run(database, job.id)
    assert look(database).status == "discovered"


def test_only_an_ended_judgement_is_opened_again(database: Database, fleet: list[str]) -> None:
    """A version under judgement, or one that is ready, is not; the error says why."""
    job_id = recorded(database, recipe_text=FAST).jobs[0].id
    with pytest.raises(Conflict, match="version 1 of digits is being judged: wait for its verdict"):
        rejudge(database)
    run(database, job_id)
    with pytest.raises(Conflict, match="version 1 of digits is ready, by the recipe that it was judged by"):
        rejudge(database)


def rejudge(database: Database) -> None:
    with database.transaction() as tx:
        versions.rejudge(tx, "digits", 1, actor="ada", reason="")


def test_archiving_takes_a_version_from_the_fleet(database: Database, fleet: list[str]) -> None:
    """Its open jobs are cancelled, the fleets go back, and it stays away."""
    evaluate = run(database, recorded(database, recipe_text=FAST).jobs[0].id)
    with database.transaction() as tx:
        archiving.archive(tx, "digits", 1, actor="ada", reason="licence")
    assert look(database).status == "archived"
    assert fleet == ["start", "withdraw 1: licence"]
    with database.read() as tx:
        assert jobs.get(tx, evaluate or 0).state == JobState.CANCELLED
    with pytest.raises(Conflict, match="version 1 of digits: it is archived, which cannot become discovered"):
        rejudge(database)


def test_a_version_is_found_by_number_alias_or_latest(database: Database) -> None:
    """What is not there is named, model or version."""
    for name in ("a", "b"):
        recorded(database, name)
    with database.transaction() as tx:
        tx.add(Alias(model_id=1, name="best", number=1))
    assert [look(database, selector).number for selector in (1, "2", "best", "latest")] == [1, 2, 1, 2]
    for selector in (3, "unknown", "²"):
        with pytest.raises(NotFound, match=f"no version digits@{selector}"):
            look(database, selector)
    with pytest.raises(NotFound, match="no model letters"):
        look(database, model="letters")


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "x" * 256, "a\nb"])
def test_a_bad_model_name_is_refused(database: Database, name: str) -> None:
    """The rule is in the message."""
    with pytest.raises(Invalid, match="1 to 255 printable characters"):
        recorded(database, model=name)


def test_an_alias_cannot_dangle(database: Database) -> None:
    """The database itself refuses an alias of no version, and to lose a version that an alias names."""
    recorded(database)
    with pytest.raises(IntegrityError), database.transaction() as tx:
        tx.add(Alias(model_id=1, name="best", number=2))
    with database.transaction() as tx:
        tx.add(Alias(model_id=1, name="best", number=1))
        tx.execute(text("DELETE FROM checkpoint_file"))
    with pytest.raises(IntegrityError), database.transaction() as tx:
        tx.execute(delete(Version))


def test_one_rollout_at_a_time(database: Database) -> None:
    """The database itself refuses a second active rollout of a model on a fleet; ended ones do not count."""
    recorded(database)

    def roll(status: str, fleet: str = "{}") -> None:
        with database.transaction() as tx:
            tx.add(Rollout(model_id=1, number=1, status=status, fleet=fleet))

    for status in ("finished", "rolled_back", "running", "aborted"):
        roll(status)
    roll("holding", fleet='{"region":"eu"}')
    with pytest.raises(IntegrityError):
        roll("paused")


def test_a_checkpoint_that_waits_says_so_once(database: Database) -> None:
    """Seeing the same again writes nothing; a new reason is an event."""
    for _ in range(2):
        with database.transaction() as tx:
            checkpoints.waiting(tx, "digits", "a", reason="12 of 64 bytes", seen="one")
    with database.transaction() as tx:
        checkpoints.refused(tx, "digits", "b.exe", reason="not a checkpoint format", seen="two")
        checkpoints.waiting(tx, "digits", "a", reason="32 of 64 bytes", seen="three", proof="P2")
    assert kinds(database) == ["checkpoint.waiting", "checkpoint.refused", "checkpoint.waiting"]
    with database.read() as tx:
        assert sorted(checkpoints.seen(tx)) == [
            ("digits", "a", "three", "waiting"),
            ("digits", "b.exe", "two", "refused"),
        ]


def test_a_checkpoint_that_went_away_does_not_wait(database: Database) -> None:
    """Its row is dropped; where versions came from it, it is complete as before."""
    recorded(database, "a")
    with database.transaction() as tx:
        checkpoints.waiting(tx, "digits", "a.safetensors", reason="being written", seen="x")
        checkpoints.waiting(tx, "digits", "b.safetensors", reason="being written", seen="x")
        for path in ("a.safetensors", "b.safetensors", "c.safetensors"):
            checkpoints.removed(tx, "digits", path)
        assert [(path, state) for _, path, _, state in checkpoints.seen(tx)] == [("a.safetensors", "complete")]


def test_racing_looks_at_a_new_checkpoint(database: Database) -> None:
    """Two daemons that see it first at the same moment write one row."""
    start = threading.Barrier(4)

    def see(_: int) -> None:
        start.wait(10)
        with database.transaction() as tx:
            checkpoints.waiting(tx, "digits", "a", reason="12 of 64 bytes", seen="one")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(see, range(4)))
    assert kinds(database) == ["checkpoint.waiting"]


def test_a_template_opens_what_waits_for_a_program(database: Database) -> None:
    """Adding it judges the needs_binding versions again; adding it twice is harmless, other content is refused."""
    run(database, recorded(database).jobs[0].id, Verdict.NEEDS_BINDING, "no template fits")
    given = {"fingerprint": "f1", "parameters": {"w": [1]}, "inputs": [], "outputs": [], "actor": "ada"}
    with database.transaction() as tx:
        first = templates.add(tx, name="mlp", digest="d1", **given)  # type: ignore[arg-type]
        assert templates.add(tx, name="mlp", digest="d1", **given).id == first.id  # type: ignore[arg-type]
        assert [row.name for row in templates.listing(tx, fingerprint="f1")] == ["mlp"]
        with pytest.raises(Conflict, match="template mlp is there with other content"):
            templates.add(tx, name="mlp", digest="d2", **given)  # type: ignore[arg-type]
    assert (look(database).status, look(database).judgement) == ("discovered", 2)
    with database.read() as tx:
        assert [job.state for job in jobs.of(tx, "version", 1)] == ["done", "queued"]


def test_a_template_that_is_added_again_brings_what_is_known_of_it_now(database: Database) -> None:
    """A template from before contracts gets one, and the event says what changed; the same again says nothing."""
    old = {"name": "ids", "datatype": "INT64", "shape": [-1, -1]}
    new = old | {"values": {"minimum": [0], "maximum": [49]}}
    for inputs in ([old], [new], [new]):
        with database.transaction() as tx:
            given = {"parameters": {}, "inputs": inputs, "outputs": [], "actor": "ada"}
            templates.add(tx, name="mlp", digest="d1", fingerprint="f1", **given)  # type: ignore[arg-type]
    with database.read() as tx:
        assert templates.get(tx, "mlp").inputs == [new]
    assert kinds(database).count("template.learnt") == 1


def test_measurements_of_a_repeated_attempt_replace_each_other(database: Database) -> None:
    """What an attempt that lost its lease had written is not counted twice; each judgement has its own."""
    recorded(database)
    with database.transaction() as tx:
        variant = artifacts.store_artifact(tx, 1, artifact_digest="aa", blobs={"bb": 64, "cc": -1})
        again = artifacts.store_artifact(tx, 1, artifact_digest="aa", blobs={"bb": 64, "cc": 5})
        assert variant.id == again.id is not None
        assert artifacts.blobs(tx, "aa") == {"aa": -1, "bb": 64, "cc": 5}
        for value in (0.5, 0.75):
            artifacts.record_metrics(tx, again.id, [Metric(name="accuracy", value=value)], judgement=1)
            artifacts.record_gates(tx, again.id, [GateResult(gate="accuracy", verdict="passed")], judgement=1)
        artifacts.record_metrics(tx, again.id, [Metric(name="accuracy", value=0.25)], judgement=2)
        assert [metric.value for metric in artifacts.metrics(tx, 1)] == [0.75]
        with pytest.raises(NotFound, match="no variant int8 of version 1"):
            artifacts.find_variant(tx, 1, "int8")


def test_every_change_is_in_the_feed(database: Database, fleet: list[str]) -> None:
    """A version's whole way can be read from its events, with before, after, actor and reason."""
    run(database, run(database, recorded(database).jobs[0].id))
    events.sequence(database, "daemon")
    with database.read() as tx:
        told = [event for event in events.read(tx, 0, 100, model="digits") if event.version == 1]
        assert tx.scalars(select(Job.state)).all() == ["done", "done"]
    assert [(event.kind, event.before, event.after.get("status")) for event in told] == [
        ("version.recorded", {}, None),
        ("version.ready", {"status": "discovered"}, "ready"),
    ]
    assert [event.actor for event in told] == ["intake", "worker"]
