"""`Client`: everything the registry can tell and do, typed, synchronous, light to import.

Every call raises the errors of `registry.errors`, as the registry raised them; Unavailable when it does not answer.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import httpx
from pydantic import TypeAdapter

from weighbridge.registry import client_download, client_feed, frames, local
from weighbridge.registry.client_download import Progress
from weighbridge.registry.client_feed import ENDED, quoted
from weighbridge.registry.client_http import Http, sent
from weighbridge.registry.errors import Conflict, NotFound
from weighbridge.registry.schemas import (
    Alias,
    AliasTarget,
    Benchmark,
    Checkpoint,
    Choice,
    Decision,
    Desired,
    Enrolled,
    Enrolment,
    Event,
    Host,
    Job,
    Loss,
    Model,
    NewToken,
    Observed,
    Page,
    Rollout,
    RolloutStart,
    Status,
    StoreAddress,
    TagValue,
    Template,
    Token,
    TokenWish,
    VariantBenchmark,
    VariantTensor,
    Version,
    VersionDetail,
    Worker,
)
from weighbridge.registry.spelling import nearest
from weighbridge.registry.template_schemas import NewTemplate

if TYPE_CHECKING:
    from pandas import DataFrame

DEFAULT_URL = "http://127.0.0.1:8400"

Verb = Literal["pause", "resume", "abort", "promote", "approve"]


class Client:
    """One registry. Thread-safe; close it, or use it as a context manager.

    `url` and `token` default to WEIGHBRIDGE_URL and WEIGHBRIDGE_TOKEN. Without a URL it is the registry of the data
    folder `data`, else of the one that the working directory or a folder above is or has, else http://127.0.0.1:8400.
    Without a token it is the one that a registry of this user left on this machine, as `weighbridge up` does.
    `timeout` is in seconds: to connect, and between two reads. Reads and idempotent writes are tried again for a short
    while. Raises NotFound for a data folder that never had a registry, NotPrivate for one that others can write to.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        data: Path | str | None = None,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        url = url or (None if data else os.environ.get("WEIGHBRIDGE_URL"))
        folder = Path(data).absolute() if data is not None else None
        if url is None and transport is None:
            url, folder = _own(folder)
        token = token or os.environ.get("WEIGHBRIDGE_TOKEN")
        self._http = Http(url or DEFAULT_URL, token, timeout, transport, folder)

    @property
    def url(self) -> str:
        return self._http.url

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- models and versions

    def models(self) -> Iterator[Model]:
        """Every model, by name; pages are fetched as they are needed."""
        return self._http.pages(Model, "/v1/models")

    def model(self, name: str) -> Model:
        return self._http.get(Model, f"/v1/models/{quoted(name)}")

    def versions(self, model: str | None = None, status: str | None = None) -> Iterator[Version]:
        """Versions, newest first; of one model, of one status, or all."""
        return self._http.pages(Version, "/v1/versions", model=model, status=status)

    def version(self, model: str, selector: int | str = "latest") -> VersionDetail:
        """One version whole, by number, alias or `latest`."""
        return client_feed.detail(self._http, model, selector)

    def wait(
        self,
        model: str,
        *,
        version: int | str | None = None,
        path: str | None = None,
        until: Collection[str] = ENDED,
        timeout: float | None = None,
    ) -> VersionDetail:
        """Wait until a version (or the newest one of a checkpoint's path) has a status of `until`, or ended otherwise.

        It ends at once where waiting is in vain: a version that `needs_binding` is returned with its reason; of a
        checkpoint that is refused, or waits for a person (its recipe is invalid), NothingToCome has it. `path` is the
        key in the bucket; a folder's ends in `/`. `timeout` in seconds. Raises TimeoutError, saying for what; Invalid.
        """
        return client_feed.wait(self._http, model, version=version, path=path, until=until, timeout=timeout)

    def wait_variants(
        self, model: str, version: int | str = "latest", *, timeout: float | None = None
    ) -> VersionDetail:
        """Wait until a version's variants are built, judged and measured. `timeout` in seconds. Raises TimeoutError."""
        return client_feed.wait_variants(self._http, model, version, timeout=timeout)

    def tensors(self, model: str, version: int | str, variant: str) -> list[VariantTensor]:
        """What became of every tensor of a variant."""
        path = f"{_version(model, version)}/variants/{quoted(variant)}/tensors"
        return list(self._http.pages(VariantTensor, path))

    def benchmarks(self, model: str, version: int | str = "latest") -> list[VariantBenchmark]:
        """Every measurement of a version's variants, newest first; `status` tells which are facts."""
        return list(self._http.pages(VariantBenchmark, f"{_version(model, version)}/benchmarks"))

    def import_benchmark(self, benchmark: Benchmark) -> list[VariantBenchmark]:
        """Record what was measured elsewhere, for every variant that has this artifact."""
        answer = self._http.send("POST", "/v1/benchmarks", body=benchmark)
        return TypeAdapter(list[VariantBenchmark]).validate_json(answer.content)

    def retry_benchmarks(self, model: str, version: int | str = "latest", variant: str | None = None) -> list[Job]:
        """Measure a version's variants, or one of them, again: the jobs that do it, due now."""
        answer = self._http.send("POST", f"{_version(model, version)}/benchmarks/retry", params={"variant": variant})
        return TypeAdapter(list[Job]).validate_json(answer.content)

    def choices(self, model: str, version: int | str = "latest") -> list[Choice]:
        """Which variant each kind of host gets of a version, and why. The kind "" is every other one."""
        return self._http.get_list(Choice, f"{_version(model, version)}/choices")

    def workers(self) -> list[Worker]:
        """The workers that build and measure variants, as they last said what they can do."""
        return self._http.get_list(Worker, "/v1/workers")

    def frame(self, what: frames.What, model: str, version: int | str = "latest") -> DataFrame:
        """A version's figures as a pandas DataFrame: variants, metrics, gates, tensors, benchmarks or rows.

        Raises ImportError where pandas is not installed (`pip install 'weighbridge[frames]'`).
        """
        return frames.frame(self, what, model, version)

    def rejudge(self, model: str, version: int | str, reason: str = "") -> VersionDetail:
        """Judge an ended version anew, by the recipe and the evaluation set that lie there now."""
        return self._version_verb(model, version, "rejudge", sent(Decision, reason=reason))

    def archive(self, model: str, version: int | str, reason: str = "", *, force: bool = False) -> VersionDetail:
        """Put a version away; a fleet that serves it goes back to the one before (`archive_loss` says who does).

        Raises LeavesNothing where there is nothing to go back to, unless it is `force`d.
        """
        return self._version_verb(model, version, "archive", sent(Decision, reason=reason, force=force))

    def archive_loss(self, model: str, version: int | str) -> Loss:
        """What archiving a version would take from whom; changes nothing."""
        return self._http.get(Loss, f"{_version(model, version)}/archive")

    def unarchive(self, model: str, version: int | str, reason: str = "") -> VersionDetail:
        """Give an archived version back the status that it had. Raises Conflict when its blobs are gone."""
        return self._version_verb(model, version, "unarchive", sent(Decision, reason=reason))

    def _version_verb(self, model: str, version: int | str, verb: str, decision: Decision) -> VersionDetail:
        path = f"{_version(model, version)}/{verb}"
        return VersionDetail.model_validate_json(self._http.send("POST", path, body=decision).content)

    def aliases(self, model: str) -> Iterator[Alias]:
        return self._http.pages(Alias, f"/v1/models/{quoted(model)}/aliases")

    def set_alias(self, model: str, name: str, version: int, *, revision: int | None = None) -> Alias:
        """Point an alias at a version. With `revision`, only if it is still at that one (0: only if it is new)."""
        path = f"/v1/models/{quoted(model)}/aliases/{quoted(name)}"
        answer = self._http.send("PUT", path, body=sent(AliasTarget, version=version), revision=revision)
        return Alias.model_validate_json(answer.content)

    def delete_alias(self, model: str, name: str, *, revision: int | None = None) -> None:
        self._http.send("DELETE", f"/v1/models/{quoted(model)}/aliases/{quoted(name)}", revision=revision)

    def set_tag(self, model: str, key: str, value: str, *, version: int | None = None) -> None:
        """Write a tag of a model, or of one of its versions."""
        self._http.send("PUT", _tag(model, key, version), body=sent(TagValue, value=value))

    def delete_tag(self, model: str, key: str, *, version: int | None = None) -> None:
        self._http.send("DELETE", _tag(model, key, version))

    def checkpoints(self, model: str | None = None, state: str | None = None) -> Iterator[Checkpoint]:
        """What lies in the bucket and is no version (yet), and why: newest first. `state`: waiting or refused."""
        return self._http.pages(Checkpoint, "/v1/checkpoints", model=model, state=state)

    def checkpoint_page(
        self, model: str | None = None, state: str | None = None, after: str | None = None, limit: int = 100
    ) -> Page[Checkpoint]:
        """One page of `checkpoints`, the newest `limit`; its `next` is the `after` of the next one, None at the end."""
        return self._http.get(Page[Checkpoint], "/v1/checkpoints", model=model, state=state, after=after, limit=limit)

    # --- bytes

    def download(
        self,
        model: str,
        version: int | str,
        dest: Path | str,
        variant: str = "original",
        progress: Progress | None = None,
    ) -> Path:
        """Put the files of a version's variant into the folder `dest`, each verified; return the folder.

        Files that are there already are kept, a broken download goes on. Raises NotFound, Conflict while there is no
        artifact, DigestMismatch.
        """
        whole = self.version(model, version)
        known = {one.name: one for one in whole.variants}
        if variant not in known and variant != "original":
            raise NotFound("variant", f"{variant} of version {whole.number} of {model}", nearest(variant, known))
        found = known.get(variant)
        if found is None or found.artifact_digest is None:
            raise Conflict(f"version {whole.number} of {model} has no artifact {variant} (yet): it is {whole.status}")
        return client_download.artifact(self._http, found.artifact_digest, Path(dest), progress)

    def blob(self, digest: str) -> bytes:
        """A small blob, verified."""
        return client_download.blob(self._http, digest)

    def stream_blob(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `offset` on, unverified; close the iterator to stop early."""
        return client_download.stream(self._http, digest, offset)

    # --- events and status

    def events(
        self,
        after: int = 0,
        limit: int | None = None,
        *,
        model: str | None = None,
        kinds: Collection[str] | None = None,
        wait: float = 0.0,
    ) -> list[Event]:
        """One page of the events behind `after`, in order. With `wait`, waits so many seconds for the first."""
        return client_feed.events(self._http, after, limit=limit, model=model, kinds=kinds, wait=wait).items

    def watch(
        self, after: int | None = None, *, model: str | None = None, kinds: Collection[str] | None = None
    ) -> Iterator[Event]:
        """Every event behind `after` (None: from now on), for ever; survives a registry that is away.

        To go on later, give the last event's `seq` as `after`.
        """
        return client_feed.watch(self._http, after, model=model, kinds=kinds)

    def status(self) -> Status:
        return self._http.get(Status, "/v1/status")

    def store(self) -> StoreAddress:
        """Where checkpoints are dropped, without any secret: credentials are the caller's own."""
        return self._http.get(StoreAddress, "/v1/store")

    def policies(self) -> list[dict[str, Any]]:
        """The operator's policies, in the order in which they are matched."""
        answer: list[dict[str, Any]] = self._http.send("GET", "/v1/policies").json()
        return answer

    # --- templates

    def templates(self) -> Iterator[Template]:
        return self._http.pages(Template, "/v1/templates")

    def template(self, name: str) -> Template:
        return self._http.get(Template, f"/v1/templates/{quoted(name)}")

    def add_template(
        self,
        name: str,
        path: Path | str,
        *,
        fingerprint: str,
        parameters: Mapping[str, Any],
        inputs: list[dict[str, Any]],
        outputs: list[dict[str, Any]],
    ) -> Template:
        """Upload a template's `.pt2` and register it. The registry never loads it. Raises Conflict, Forbidden."""
        digest = client_download.upload(self._http, Path(path))
        new = sent(
            NewTemplate,
            name=name,
            digest=digest,
            fingerprint=fingerprint,
            parameters=dict(parameters),
            inputs=inputs,
            outputs=outputs,
        )
        return Template.model_validate_json(self._http.send("POST", "/v1/templates", body=new).content)

    # --- rollouts

    def rollouts(self, model: str | None = None, *, going: bool = False) -> Iterator[Rollout]:
        """Rollouts, newest first, without their steps. `going`: only those that have not ended."""
        return self._http.pages(Rollout, "/v1/rollouts", model=model, going=going or None)

    def rollout(self, rollout_id: int) -> Rollout:
        """One rollout with its steps."""
        return self._http.get(Rollout, f"/v1/rollouts/{rollout_id}")

    def start_rollout(
        self,
        model: str,
        version: int | str | None = None,
        *,
        variant: str | None = None,
        settings: Mapping[str, Any] | None = None,
        reason: str = "",
    ) -> Rollout:
        """Roll out a version, by number or alias (None: the newest ready one).

        `settings` override the recipe's within the policy. `variant` is for every kind of host; None: each kind gets
        what is measured to be best for it.
        """
        wishes = dict(settings or {})
        start = sent(RolloutStart, model=model, version=version, variant=variant, settings=wishes, reason=reason)
        return Rollout.model_validate_json(self._http.send("POST", "/v1/rollouts", body=start).content)

    def roll_back(
        self,
        model: str,
        version: int | str | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        reason: str = "",
    ) -> Rollout:
        """Roll an earlier version out again (None: the one that was served before the champion).

        Raises NotFound where nothing was served before, Conflict while a rollout is under way: `abort` that one.
        """
        before = "previous" if version is None else version
        return self.start_rollout(model, before, settings=settings, reason=reason)

    def decide(self, rollout_id: int, verb: Verb, reason: str = "", actor: str = "", *, force: bool = False) -> Rollout:
        """A person's decision, recorded in the token's name; `actor` is for registries of before 0.1.

        Raises LeavesNothing for an `abort` with nothing to go back to any more, unless it is `force`d.
        """
        body = sent(Decision, reason=reason, actor=actor, force=force)
        return Rollout.model_validate_json(
            self._http.send("POST", f"/v1/rollouts/{rollout_id}/{verb}", body=body).content
        )

    def pause(self, rollout_id: int, reason: str = "", actor: str = "") -> Rollout:
        return self.decide(rollout_id, "pause", reason, actor)

    def resume(self, rollout_id: int, reason: str = "", actor: str = "") -> Rollout:
        return self.decide(rollout_id, "resume", reason, actor)

    def abort(self, rollout_id: int, reason: str = "", actor: str = "", *, force: bool = False) -> Rollout:
        """End the rollout; its hosts go back to what they served before."""
        return self.decide(rollout_id, "abort", reason, actor, force=force)

    def promote(self, rollout_id: int, reason: str = "", actor: str = "") -> Rollout:
        """Skip the rest of the bake."""
        return self.decide(rollout_id, "promote", reason, actor)

    def approve(self, rollout_id: int, reason: str = "", actor: str = "") -> Rollout:
        return self.decide(rollout_id, "approve", reason, actor)

    # --- hosts, as people see them

    def hosts(self) -> Iterator[Host]:
        return self._http.pages(Host, "/v1/hosts")

    def host(self, host_id: str) -> Host:
        return self._http.get(Host, f"/v1/hosts/{quoted(host_id)}")

    def retire(self, host_id: str, reason: str = "", *, force: bool = False) -> Host:
        """Take a host out for good. Raises LeavesNothing for the last one that serves a model, unless `force`d."""
        path = f"/v1/hosts/{quoted(host_id)}/retire"
        body = sent(Decision, reason=reason, force=force)
        return Host.model_validate_json(self._http.send("POST", path, body=body).content)

    # --- hosts, as they speak for themselves (docs/host-protocol.md)

    def enrol(self, enrolment: Enrolment) -> Enrolled:
        """Register this process as a host's newest. Not tried again: the token may be used up by the first try."""
        return Enrolled.model_validate_json(self._http.send("POST", "/v1/hosts", body=enrolment).content)

    def desired(self, host_id: str, after: int = -1, wait: float = 0.0) -> Desired:
        """What the host should hold: as soon as its revision is over `after`, at the latest after `wait` seconds."""
        params = {"after": after, "wait": wait}
        answer = self._http.send("GET", f"/v1/hosts/{quoted(host_id)}/desired", params=params, wait=wait)
        return Desired.model_validate_json(answer.content)

    def observed(self, host_id: str, observed: Observed) -> None:
        """Report what the host holds. Raises StaleEpoch when a newer process took over: end."""
        self._http.send("PUT", f"/v1/hosts/{quoted(host_id)}/observed", body=observed)

    # --- tokens

    def create_token(self, role: str, name: str = "", *, ttl: float | None = None, host_id: str | None = None) -> str:
        """Create a token that lives `ttl` seconds (None: until revoked); it is never shown again."""
        wish = sent(TokenWish, role=role, name=name, ttl=ttl, host_id=host_id)
        return NewToken.model_validate_json(self._http.send("POST", "/v1/tokens", body=wish).content).token

    def browser_address(self) -> str:
        """An address that signs a browser in, once: it reads in this token's name for some hours."""
        once = NewToken.model_validate_json(self._http.send("POST", "/v1/sessions").content).token
        return f"{self.url}/?token={once}"

    def tokens(self) -> Iterator[Token]:
        return self._http.pages(Token, "/v1/tokens")

    def revoke_token(self, token_id: int, *, force: bool = False) -> None:
        """End a token at once. Raises Conflict for that of a host that serves, unless it is `force`d."""
        self._http.send("DELETE", f"/v1/tokens/{token_id}", params={"force": force or None})


def _own(data: Path | None) -> tuple[str | None, Path | None]:
    """URL and data folder of the registry of this user that is meant where no address is given; None: there is none."""
    found = local.of(data) if data is not None else local.around(Path.cwd())
    if found is None and data is not None:
        raise NotFound("registry in the data folder", data)
    return (found.url, found.data) if found else (None, None)


def _version(model: str, version: int | str) -> str:
    return f"/v1/models/{quoted(model)}/versions/{quoted(str(version))}"


def _tag(model: str, key: str, version: int | None) -> str:
    owner = f"/v1/models/{quoted(model)}" + (f"/versions/{version}" if version is not None else "")
    return f"{owner}/tags/{quoted(key)}"
