"""Recipes are refused with line and field; a policy is never weakened."""

from __future__ import annotations

import pytest

from weighbridge.registry.errors import InvalidRecipe
from weighbridge.registry.recipe import (
    NO_POLICY,
    Gate,
    Policy,
    Recipe,
    effective,
    parse,
    policy_for,
    program_allowed,
    revision_digest,
)

WHOLE = """\
program:
  template: mlp
lane: fast
gates:
  - metric: accuracy
    min: 0.9
    max_drop: 0.01
rollout:
  automatic: true
  waves: [1, 25%, 100%]
  bake: 60
"""


def test_a_recipe_is_read() -> None:
    """Every part that is given is there; the rest has its defaults."""
    recipe = parse(WHOLE)
    assert recipe.program is not None
    assert recipe.program.template == "mlp"
    assert recipe.gates == (Gate(metric="accuracy", min=0.9, max_drop=0.01),)
    assert recipe.rollout.waves == (1, "25%", "100%")
    assert (recipe.lane, recipe.rollout.bake, recipe.rollout.max_lost) == ("fast", 60.0, 0)
    assert parse("") == parse(b"# only a comment\n") == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lane: quick", "recipe.yaml line 1: lane: Input should be 'standard' or 'fast'"),
        ("lane: fast\ngate: []", "recipe.yaml line 2: gate: Extra inputs are not permitted"),
        ("gates:\n  - metric: accuracy\n    min: high", "line 3: gates.0.min: Input should be a valid number"),
        (
            "gates:\n  - {metric: f1, min: 0.5}\n  - metric: f1",
            "line 3: gates.1: Value error, give at least one of min",
        ),
        ("rollout:\n  waves: [1, 0]", "line 2: rollout.waves.1: Value error, a wave has at least one host"),
        ("rollout:\n  waves: [120%]", "line 2: rollout.waves.0: Value error, a wave is a count of hosts"),
        ("program:\n  template: a\n  factory: b", "line 1: program: Value error, give either template or factory"),
        ("rollout:\n  bake: -1", "line 2: rollout.bake: Input should be greater than or equal to 0"),
        ("lane: [fast", "recipe.yaml line 1: did not find expected ',' or ']'"),
        ("- lane", "recipe.yaml line 1: a recipe is a mapping of fields, not a list"),
        ("lane: !!python/object/apply:os.system [id]", "recipe.yaml line 1: could not determine a constructor"),
        ("lane: &a [*a]", "recipe.yaml line 1: aliases (*name) are not read"),
        (b"lane: \xff", "recipe.yaml: not UTF-8 text (byte 6)"),
        ("lane: fast\x00", "recipe.yaml"),
        ("variants:\n  - bf16\n  - int3", "line 3: variants.1.method: Input should be 'bf16'"),
        ("variants:\n  - {method: bf16, gruop: 4}", "line 2: variants.0.gruop: Extra inputs are not permitted"),
        ("lane: fast\nvariants: [bf16, bf16]", "line 2: variants: Value error, bf16 stands there twice"),
        ("variants:\n  - method: bf16\n    name: original", "line 2: variants.0: Value error, `original` is the"),
        ("variants:\n  - method: bf16\n    recover: {}", "line 2: variants.0: Value error, recover: bf16 has nothing"),
        ("variants:\n  - method: prune-wanda\n    sparsity: 1", "line 3: variants.0.sparsity: Input should be less"),
        ("objective:\n  best: speed", "line 2: objective.best: Input should be 'latency'"),
    ],
)
def test_a_wrong_recipe_names_line_and_field(text: str | bytes, message: str) -> None:
    """Nothing of it is used."""
    with pytest.raises(InvalidRecipe) as wrong:
        parse(text)
    assert message in str(wrong.value)


def test_everything_wrong_is_named_at_once() -> None:
    """One reading finds both mistakes."""
    with pytest.raises(InvalidRecipe, match=r"line 1: lane: .*; recipe.yaml line 3: rollout.bake: "):
        parse("lane: x\nrollout:\n  bake: long")


def test_bombs_are_refused() -> None:
    """A recipe from the bucket cannot exhaust its reader, by nesting, by size, or by aliases of aliases."""
    with pytest.raises(InvalidRecipe, match="line 1: nested deeper than 16"):
        parse("lane: " + "[" * 5000)
    with pytest.raises(InvalidRecipe, match="a recipe has at most 65536"):
        parse("#" * (1 << 20))
    with pytest.raises(InvalidRecipe, match="line 2: aliases"):
        parse("a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]")


def test_without_recipe_and_policy_nothing_is_automatic() -> None:
    """A recipe may ask for it, or the operator's policy says so for models without one."""
    assert effective(None, NO_POLICY)[0].rollout.automatic is False
    assert effective(None, Policy(automatic=True))[0].rollout.automatic is True
    assert effective(Recipe(), Policy(automatic=True))[0].rollout.automatic is False
    assert effective(parse("rollout: {automatic: true}"), NO_POLICY)[0].rollout.automatic is True


OVERRULED = [
    ("rollout: {automatic: true}", Policy(automatic=False), "rollout.automatic: True is overruled"),
    ("rollout: {approval: false}", Policy(approval=True), "rollout.approval: false is overruled"),
    ("rollout: {bake: 5}", Policy(min_bake=60), "rollout.bake: 5.0 is overruled by the policy (min_bake = 60 s)"),
    ("rollout: {max_error_rate: 0.5}", Policy(max_error_rate=0.02), "rollout.max_error_rate: 0.5 is overruled"),
    ("rollout: {max_lost: 9}", Policy(max_lost=1), "rollout.max_lost: 9 is overruled"),
    ("lane: fast", Policy(fast_lane=False), "lane: fast is overruled"),
    (
        "gates: [{metric: f1, min: 0.1}]",
        Policy(gates=(Gate(metric="f1", min=0.8),)),
        "gates.f1.min: 0.1 is overruled by the policy (min = 0.8)",
    ),
    ("quality: {keep: 0.5}", Policy(min_keep=0.9), "quality.keep: 0.5 is overruled by the policy (min_keep = 0.9)"),
    (
        "variants: [{method: bf16, quality: {keep: 0.7}}]",
        Policy(min_keep=0.9),
        "variants.bf16.quality.keep: 0.7 is overruled by the policy (min_keep = 0.9)",
    ),
    ("variants: [bf16, fp16]", Policy(variants=False), "variants: bf16, fp16: overruled by the policy (variants ="),
    ("program: {factory: 'os:system'}", NO_POLICY, "program: factory:os:system is not allowed"),
]


@pytest.mark.parametrize(("text", "policy", "word"), OVERRULED)
def test_a_recipe_cannot_weaken_the_policy(text: str, policy: Policy, word: str) -> None:
    """What it asks for in vain is named; merging again changes nothing."""
    merged, ignored = effective(parse(text), policy)
    assert [line for line in ignored if line.startswith(word)] == ignored != []
    again, _ = effective(merged, policy)
    assert again.rollout == merged.rollout
    assert again.lane == merged.lane
    assert (again.variants, again.quality) == (merged.variants, merged.quality)


def test_a_recipe_may_ask_for_less() -> None:
    """Stricter wishes stand beside the policy, and nothing is reported."""
    policy = Policy(gates=(Gate(metric="f1", min=0.5),), min_bake=10, max_error_rate=0.1)
    merged, ignored = effective(parse("gates: [{metric: f1, min: 0.9}]\nrollout: {bake: 99}"), policy)
    assert ignored == []
    assert merged.gates == (Gate(metric="f1", min=0.5), Gate(metric="f1", min=0.9))
    assert merged.rollout.bake == 99


def test_a_quality_below_the_policys_is_raised() -> None:
    """In every variant, and silently where the recipe asked for nothing."""
    merged, ignored = effective(parse("variants: [bf16, {method: fp16, quality: {keep: 0.9}}]"), Policy(min_keep=0.999))
    assert merged.quality.keep == 0.999
    assert merged.variants[0].quality is None
    assert merged.variants[1].quality is not None
    assert merged.variants[1].quality.keep == 0.999
    assert len(ignored) == 1
    assert effective(parse("variants: [bf16]"), Policy(variants=False))[0].measured is False


def test_variants_are_named_by_their_method() -> None:
    """A bare method is a wish with its defaults; two of one method need names; versions are then measured."""
    recipe = parse(
        "variants: [bf16, {method: int4-groups, group: 64}, {method: int4-groups, name: coarse, group: 128}]"
    )
    assert [(wish.name, wish.group) for wish in recipe.variants] == [("bf16", 32), ("int4-groups", 64), ("coarse", 128)]
    assert recipe.measured
    assert not parse("").measured
    assert parse("benchmark: true").measured
    assert not parse("{variants: [bf16], benchmark: false}").measured


def test_the_first_policy_that_matches_counts() -> None:
    """Shell patterns on the model's name; factories must be named."""
    policies = (Policy(model="prod-*", approval=True), Policy(model="*", programs=("factory:zoo.*",)))
    assert policy_for("prod-digits", policies).approval
    assert program_allowed(policy_for("digits", policies), "factory:zoo.nets:mlp")
    assert not program_allowed(policy_for("digits", policies), "template:mlp")
    assert policy_for("digits", ()) == NO_POLICY
    assert program_allowed(NO_POLICY, "template:mlp")
    assert not program_allowed(NO_POLICY, "factory:zoo.nets:mlp")


def test_a_revision_is_its_text_and_its_policy() -> None:
    """No recipe is another revision than an empty one: a policy treats them differently."""
    strict = Policy(approval=True)
    assert len({revision_digest(text, policy) for text in (None, "", "a") for policy in (NO_POLICY, strict)}) == 6
    assert revision_digest("a", Policy()) == revision_digest("a", NO_POLICY)
