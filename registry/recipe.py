"""A model's wishes (`recipe.yaml`, untrusted), the operator's policy (settings, trusted), and what both make together.

Wrong recipes are refused whole, with the line and the field. A recipe can ask for less than the policy allows, never
for more: `effective` names what it ignored.
"""

from __future__ import annotations

import json
import operator
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import yaml
from blake3 import blake3
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from weighbridge import limits
from weighbridge.registry.caps import Caps, within
from weighbridge.registry.errors import InvalidRecipe
from weighbridge.storage.names import composed


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Magnitude = Annotated[float, Field(ge=-1e30, le=1e30)]
"""A metric or a bound of one: what arithmetic with others of its kind leaves finite."""


class TensorWish(_Strict):
    """An input or output of a factory's program; templates carry their own."""

    name: limits.Name
    datatype: limits.Id
    shape: tuple[Annotated[int, Field(ge=-1, le=limits.COUNT)], ...]


class ProgramWish(_Strict):
    """The program the weights belong to: a registered template's name, or an allow-listed `package.module:factory`."""

    template: limits.Name | None = None
    factory: limits.Name | None = None

    @model_validator(mode="after")
    def _one(self) -> ProgramWish:
        if (self.template is None) == (self.factory is None):
            raise ValueError("give either template or factory")
        return self


MetricName = Literal[
    "accuracy", "precision", "recall", "f1", "mse", "mae", "r2", "perplexity", "cosine", "retrieval_agreement"
]
ZERO_TAIL = "tensors.zero_tail"
"""What a gate may name beside metrics: bytes of zeros where bytes may be missing, which validation counts."""
Task = Literal["classification", "regression", "language", "embedding"]


class Gate(_Strict):
    """A rule on a metric. `min`, `max`: bounds. `max_drop`: how much less than the champion, on one evaluation set."""

    metric: MetricName | Literal["tensors.zero_tail"]
    min: Magnitude | None = None
    max: Magnitude | None = None
    max_drop: Annotated[Magnitude, Field(ge=0)] | None = None
    required: bool = False
    """Fails a version whose task has no such metric; else the gate is not applicable to it."""

    @model_validator(mode="after")
    def _some(self) -> Gate:
        if self.metric == ZERO_TAIL and (self.max is None or self.min is not None or self.max_drop is not None):
            raise ValueError(f"{ZERO_TAIL} takes max alone, bytes")
        if self.min is None and self.max is None and self.max_drop is None:
            raise ValueError("give at least one of min, max, max_drop")
        return self


def _wave(value: int | str) -> int | str:
    if isinstance(value, int):
        if not 0 < value <= limits.COUNT:
            raise ValueError("a wave has at least one host, and no more than anybody has")
        return value
    number = value.removesuffix("%")
    if (
        number == value
        or not (number.isascii() and number.isdigit() and len(number) <= 3)
        or not 0 < int(number) <= 100
    ):
        raise ValueError("a wave is a count of hosts (1) or a share of the fleet ('25%')")
    return value


def _fleet(labels: dict[str, str]) -> dict[str, str]:
    """A fleet is named by its labels in one column."""
    if len(json.dumps(labels, ensure_ascii=False)) > limits.PATH:
        raise ValueError(f"the labels have more than {limits.PATH} characters together")
    return labels


Wave = Annotated[int | str, AfterValidator(_wave)]
Share = Annotated[float, Field(ge=0, le=1)]
_WEEK = 7 * 86400
Seconds = Annotated[float, Field(gt=0, le=_WEEK)]


class RolloutSettings(_Strict):
    """How a fleet moves. Waves are cumulative; the last one is always the whole fleet. Times are seconds."""

    automatic: bool = False
    """Start by itself when a version becomes ready."""
    again: bool = False
    """Start by itself also when weights that are known come again: the version that they are is rolled out."""
    approval: bool = False
    """Wait for a person's `approve` before the first wave."""
    fleet: Annotated[limits.Labels, AfterValidator(_fleet)] = Field(default_factory=dict)
    """Labels that a host must carry; empty: every host."""
    waves: Annotated[tuple[Wave, ...], Field(max_length=100)] = (1, "100%")
    bake: Annotated[float, Field(ge=0, le=_WEEK)] = 30.0
    """How long a wave must stay healthy before the next."""
    max_error_rate: Share = 0.01
    """The absolute limit of failed requests, per host of the wave, during the bake."""
    min_requests: limits.Count = 20
    """Below this many requests a host's error rate decides nothing."""
    lost_after: Seconds = 60.0
    """A host silent for this long leaves the wave and is reported."""
    max_lost: limits.Count = 0
    """More lost hosts than this: hold."""
    load_timeout: Seconds = 600.0
    """A host that has not the new version live after this long fails the wave."""


class OutputQuality(_Strict):
    """How far one output of a variant may be from the original's. What is not given has a default by the output's kind:
    `max_kl_mean` 0.02 for scores and logits, `min_top1` 0.98 for whole numbers, `max_error` 0.1 for all else."""

    min_top1: Share | None = None
    """Least share of rows whose largest score, or of whole numbers that, stay the same."""
    max_kl_mean: Annotated[Magnitude, Field(ge=0)] | None = None
    """Most mean Kullback-Leibler divergence, in nats."""
    max_error: Annotated[Magnitude, Field(ge=0)] | None = None
    """Most root mean square of the difference, as a share of what the output varies by."""
    min_cosine: Annotated[float, Field(ge=-1, le=1)] | None = None


class Quality(_Strict):
    """What a variant must keep of the original, on the same inputs. What cannot be measured does not pass.

    Where there is an evaluation set, `keep` decides, and the drift bounds that are given; where there is none, drift
    on the golden or on synthetic inputs decides, by the given bounds or the defaults of the task.
    """

    keep: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the original's metric: the lower end of a paired bootstrap interval must reach it. For an error (mse,
    mae, perplexity) the original's share of the variant's."""
    metric: MetricName | None = None
    """None: that of the task (accuracy, mse, perplexity, cosine)."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the one-sided bound."""
    min_top1: Share | None = None
    """Least share of rows (tokens) whose largest output stays the same."""
    max_kl_mean: Annotated[Magnitude, Field(ge=0)] | None = None
    """Most mean Kullback-Leibler divergence of the softmax of the outputs, in nats."""
    max_kl_p99: Annotated[Magnitude, Field(ge=0)] | None = None
    min_cosine: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Least mean cosine between the original's output vectors and the variant's."""
    outputs: Annotated[dict[limits.Name, OutputQuality], Field(max_length=limits.LABELS)] = Field(default_factory=dict)
    """By output: bounds beside the metric's, and those of every other output in place of the defaults."""


class Recovery(_Strict):
    """Fine-tune after pruning, or with quantization in the loop, on the recipe's training set. Steps of AdamW."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    batch: Annotated[limits.Count, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.01
    distill: Share = 0.5
    """Share of the loss that follows the original's outputs; the rest follows the labels."""
    ranks: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes of one torchrun, each on its own device or share of the processors."""
    seed: limits.Count = 0


Method = Literal[
    "bf16",
    "fp16",
    "int8-weight-only",
    "int4-weight-only",
    "int8-dynamic",
    "int8-qat",
    "fp8-weight-only",
    "fp8-dynamic",
    "int8-rows",
    "int4-groups",
    "int2-groups",
    "fp8-tensors",
    "prune-magnitude",
    "prune-wanda",
    "sparse-2-4",
    "prune-channels",
    "onnx",
    "onnx-fp16",
    "onnx-int8-dynamic",
    "onnx-int8-static",
    "onnx-int8-weight-only",
    "onnx-int4-weight-only",
]
"""docs/variants.md says what each does. `*-rows`, `*-groups` and `*-tensors` stream: any safetensors, any size."""


class VariantWish(_Strict):
    """One variant to build. Written as a bare method where its defaults are right: `- onnx-int8-dynamic`."""

    method: Method
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")] = ""
    """Empty: the method."""
    group: Annotated[int, Field(ge=2, le=65536)] = 32
    """Weights that share a scale, where the method has groups."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the weights (prune-channels: of the channels) to remove."""
    skip: Annotated[tuple[Annotated[str, Field(max_length=limits.TENSOR)], ...], Field(max_length=limits.ENTRIES)] = ()
    """Patterns of layers that stay as they are (`lm_head`, `*.0`)."""
    calibration_rows: Annotated[int, Field(ge=1, le=65536)] = 256
    max_ratio: Annotated[Magnitude, Field(gt=0)] | None = None
    """Most bytes of weights, as a share of the original's; missing it fails the variant. None: what the method
    promises for the tensors that it can change."""
    recover: Recovery | None = None
    quality: Quality | None = None
    """None: the recipe's."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"method": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _named(self) -> VariantWish:
        if not self.name:
            object.__setattr__(self, "name", self.method)
        if self.name == "original":
            raise ValueError("`original` is the checkpoint itself: choose another name")
        if self.recover is not None and not (self.method.startswith("prune-") or self.method in RECOVERABLE):
            raise ValueError(f"recover: {self.method} has nothing to train; it is for prune-*, sparse-2-4, int8-qat")
        return self


RECOVERABLE = ("sparse-2-4", "int8-qat")
NEEDS_CUDA = ("fp8-dynamic", "sparse-2-4")
"""Methods whose result runs on CUDA only: where no worker has it, the variant is not applicable."""


STREAMED = ("int8-rows", "int4-groups", "int2-groups", "fp8-tensors")
"""Methods that read one file of weights at a time, in flat memory: each file can be a job of its own."""


class Objective(_Strict):
    """What the variant that a kind of host serves is chosen by, among those that passed and meet every limit."""

    best: Literal["latency", "throughput", "memory", "quality"] = "latency"
    """latency: lowest p99, SingleStream; throughput: most rows a second, Offline; memory: least peak bytes."""
    max_p99: Seconds | None = None
    """Seconds."""
    min_throughput: Annotated[Magnitude, Field(gt=0)] | None = None
    """Rows a second."""
    max_memory: Annotated[limits.Bytes, Field(gt=0)] | None = None
    """Bytes."""


def _distinct(wishes: tuple[VariantWish, ...]) -> tuple[VariantWish, ...]:
    names = [wish.name for wish in wishes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} stands there twice; give one of them another name")
    return wishes


class Recipe(_Strict):
    """Everything a model's owner may wish for."""

    program: ProgramWish | None = None
    inputs: tuple[TensorWish, ...] = ()
    outputs: tuple[TensorWish, ...] = ()
    lane: Literal["standard", "fast"] = "standard"
    """fast: ready after validation; evaluation runs behind the rollout and can roll it back."""
    task: Task = "classification"
    """What the evaluation set measures."""
    output: limits.Name | None = None
    """The output that it measures. None: the only one that fits the task and the labels, or is named like it."""
    threshold: Magnitude | None = None
    """Of a classification by one number a row: class 1 above it. None: 0.5 for probabilities, 0 for logits."""
    gates: tuple[Gate, ...] = ()
    variants: Annotated[tuple[VariantWish, ...], Field(max_length=32), AfterValidator(_distinct)] = ()
    quality: Quality = Quality()
    """For every variant that has none of its own."""
    objective: Objective = Objective()
    benchmark: bool | None = None
    """Measure the original and every variant that passed, on each kind of device. None: if there are variants."""
    rollout: RolloutSettings = RolloutSettings()

    @model_validator(mode="after")
    def _known(self) -> Recipe:
        """A factory's outputs stand here; a template's are known only when a version is judged."""
        names = [wish.name for wish in self.outputs]
        asked = [self.output, *self.quality.outputs]
        if names and (wrong := [one for one in asked if one is not None and one not in names]):
            raise ValueError(f"{wrong[0]} is none of the outputs ({', '.join(names)})")
        if self.threshold is not None and self.task != "classification":
            raise ValueError(f"threshold is for task: classification, not {self.task}")
        return self

    @property
    def measured(self) -> bool:
        """Whether its versions are benchmarked."""
        return bool(self.variants) if self.benchmark is None else self.benchmark


class Policy(Caps):
    """What no recipe weakens, for the models whose name matches `model` (a shell pattern). The operator's."""

    model: Annotated[str, AfterValidator(composed)] = "*"
    programs: tuple[str, ...] = ("template:*",)
    """Patterns of allowed programs: `template:NAME`, `factory:package.module:name`. A factory must be named here."""
    gates: tuple[Gate, ...] = ()
    """Minimum gates, added to the recipe's."""
    automatic: bool | None = None
    """True: also without a recipe. False: never. None: as the recipe says; without a recipe never."""
    approval: bool = False
    fast_lane: bool = True
    """Whether recipes may ask for the fast lane."""
    min_bake: Annotated[float, Field(ge=0, le=_WEEK)] = 0.0
    """Seconds."""
    max_error_rate: Share = 1.0
    max_lost: limits.Count | None = None
    """The most lost hosts that a recipe may allow; None: no bound."""
    min_keep: Share = 0.0
    """The least `quality.keep` that a recipe may ask of its variants."""
    variants: bool = True
    """Whether recipes may have variants built at all."""


NO_POLICY = Policy()


def policy_for(model: str, policies: tuple[Policy, ...]) -> Policy:
    """The first policy whose pattern matches, or NO_POLICY (templates only, nothing automatic without a recipe)."""
    return next((policy for policy in policies if fnmatchcase(model, policy.model)), NO_POLICY)


def program_allowed(policy: Policy, program: str) -> bool:
    """Whether `template:NAME` or `factory:package.module:name` is allowed."""
    return any(fnmatchcase(program, pattern) for pattern in policy.programs)


def effective(recipe: Recipe | None, policy: Policy) -> tuple[Recipe, list[str]]:
    """Merge; return the recipe that judges, and in words what the given one asked for in vain. Raises InvalidRecipe."""
    given, ignored = within(recipe or Recipe(rollout=RolloutSettings(automatic=bool(policy.automatic))), policy)
    rollout = given.rollout
    changes: dict[str, Any] = {}

    def overrule(field: str, value: object, rule: str) -> None:
        ignored.append(f"rollout.{field}: {getattr(rollout, field)} is overruled by the policy ({rule})")
        changes[field] = value

    if policy.automatic is False and rollout.automatic:
        overrule("automatic", False, "automatic = false")
    if policy.approval and not rollout.approval:
        changes["approval"] = True
        if recipe is not None and "approval" in recipe.rollout.model_fields_set:
            ignored.append("rollout.approval: false is overruled by the policy (approval = true)")
    if rollout.bake < policy.min_bake:
        overrule("bake", policy.min_bake, f"min_bake = {policy.min_bake:g} s")
    if rollout.max_error_rate > policy.max_error_rate:
        overrule("max_error_rate", policy.max_error_rate, f"max_error_rate = {policy.max_error_rate:g}")
    if policy.max_lost is not None and rollout.max_lost > policy.max_lost:
        overrule("max_lost", policy.max_lost, f"max_lost = {policy.max_lost}")
    lane = given.lane
    if lane == "fast" and not policy.fast_lane:
        ignored.append("lane: fast is overruled by the policy (fast_lane = false)")
        lane = "standard"
    gates, weaker = _merge_gates(given.gates, policy.gates)
    ignored += weaker
    variants, quality, lower = _merge_variants(given, policy)
    ignored += lower
    program = given.program
    if program is not None:
        wish = f"template:{program.template}" if program.template else f"factory:{program.factory}"
        if not program_allowed(policy, wish):
            # Kept: validation refuses it by name, so that the version says so too.
            ignored.append(f"program: {wish} is not allowed by the policy (programs = {', '.join(policy.programs)})")
    merged = {"lane": lane, "gates": gates, "variants": variants, "quality": quality}
    return given.model_copy(update={**merged, "rollout": rollout.model_copy(update=changes)}), ignored


def _merge_variants(given: Recipe, policy: Policy) -> tuple[tuple[VariantWish, ...], Quality, list[str]]:
    """The variants that the policy lets be built, each with a quality that keeps at least what the policy says."""
    ignored: list[str] = []

    def raised(quality: Quality, where: str) -> Quality:
        if quality.keep >= policy.min_keep:
            return quality
        if "keep" in quality.model_fields_set:
            rule = f"min_keep = {policy.min_keep:g}"
            ignored.append(f"{where}.keep: {quality.keep:g} is overruled by the policy ({rule})")
        return quality.model_copy(update={"keep": policy.min_keep})

    common = raised(given.quality, "quality")
    if given.variants and not policy.variants:
        names = ", ".join(wish.name for wish in given.variants)
        return (), common, [*ignored, f"variants: {names}: overruled by the policy (variants = false)"]
    wishes = tuple(
        wish
        if wish.quality is None
        else wish.model_copy(update={"quality": raised(wish.quality, f"variants.{wish.name}.quality")})
        for wish in given.variants
    )
    return wishes, common, ignored


def _merge_gates(wished: tuple[Gate, ...], minimum: tuple[Gate, ...]) -> tuple[tuple[Gate, ...], list[str]]:
    """All of both; a wished bound that is weaker than the policy's on the same metric is named."""
    ignored = []
    for floor in minimum:
        for gate in wished:
            if gate.metric != floor.metric:
                continue
            pairs = (
                ("min", gate.min, floor.min, operator.lt),
                ("max", gate.max, floor.max, operator.gt),
                ("max_drop", gate.max_drop, floor.max_drop, operator.gt),
            )
            ignored += [
                f"gates.{gate.metric}.{name}: {own:g} is overruled by the policy ({name} = {bound:g})"
                for name, own, bound, weaker in pairs
                if own is not None and bound is not None and weaker(own, bound)
            ]
    return (*minimum, *(gate for gate in wished if gate not in minimum)), ignored


def parse(text: str | bytes, *, name: str = "recipe.yaml") -> Recipe:
    """Read a recipe. Raises InvalidRecipe naming the line and the field of everything that is wrong."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        _refuse_bombs(text, name)
        node, data = _load(text, name)
    except UnicodeDecodeError as exc:
        raise InvalidRecipe(f"{name}: not UTF-8 text (byte {exc.start})") from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        # libyaml finds an open bracket's fault behind the last line.
        where = f" line {min(mark.line, len(text.splitlines()) - 1) + 1}" if mark else ""
        raise InvalidRecipe(f"{name}{where}: {getattr(exc, 'problem', None) or exc}") from exc
    if data is None:
        return Recipe()
    if not isinstance(data, dict):
        raise InvalidRecipe(f"{name} line 1: a recipe is a mapping of fields, not a {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as exc:
        problems = [
            f"{name} line {_line(node, error['loc'])}: {_field(error['loc'])}: {error['msg']}"
            for error in exc.errors(include_url=False, include_context=False, include_input=False)[:_TOLD]
        ]
        more = exc.error_count() - len(problems)
        raise InvalidRecipe("; ".join(problems) + (f"; and {more:,} more" if more else "")) from exc


_MAX_DEPTH, _MAX_VALUES = 16, 5_000
_TOLD = 10
"""Mistakes that are told at once."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, where PyYAML was built with it: thirty times as fast."""


def _load(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """The recipe's nodes, for their lines, and its data. Raises InvalidRecipe for a value that is none of its kind."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        # PyYAML's constructors let their own errors out: `!!bool maybe`, 2026-13-45, an integer of 5,000 digits.
        what = limits.cut(str(exc), limits.QUOTED)
        raise InvalidRecipe(f"{name}: it has a value that cannot be read: {what}") from exc
    finally:
        loader.dispose()


def _refuse_bombs(text: str, name: str) -> None:
    """The bucket is untrusted: bound what YAML makes of a few bytes. Raises InvalidRecipe."""
    if len(text) > limits.RECIPE:
        raise InvalidRecipe(f"{name}: {len(text)} characters, a recipe has at most {limits.RECIPE}")
    depth = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        values += isinstance(event, yaml.NodeEvent)
        if values > _MAX_VALUES:
            raise InvalidRecipe(f"{name}: it has more than {_MAX_VALUES:,} values")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
            rule = f"nested deeper than {_MAX_DEPTH}" if depth > _MAX_DEPTH else "aliases (*name) are not read"
            raise InvalidRecipe(f"{name} line {_mark(event)}: {rule}")
        if isinstance(event, yaml.ScalarEvent) and not limits.is_storable(event.value):
            raise InvalidRecipe(f"{name} line {_mark(event)}: a character that no text holds (NUL, half of a pair)")


def _mark(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _field(loc: tuple[int | str, ...]) -> str:
    return limits.cut(".".join(map(str, loc)), limits.QUOTED)


def _line(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int:
    """The 1-based line where `loc` stands, or that of its nearest parent that stands there."""
    line = node.start_mark.line if node else 0
    for part in loc:
        child: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if pair:
                line, child = pair[0].start_mark.line, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
            line = child.start_mark.line
        if child is None:
            break
        node = child
    return line + 1


def revision_digest(text: str | None, policy: Policy) -> str:
    """Identity of a recipe revision: BLAKE3 of the text (or that there is none) and of the policy it is merged with."""
    given = "none" if text is None else f"text {text}"
    return blake3(f"{given}\0{policy.model_dump_json()}".encode()).hexdigest()
