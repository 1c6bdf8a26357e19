"""The report: every fact as text, nothing that runs or calls home, names that cannot break out, the same bytes."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures.report import BESIDE, NAMES, THEN, subject

import weighbridge.report
from weighbridge.cli import main, session
from weighbridge.cli.exits import Exit
from weighbridge.registry.schemas import Metric, Variant, VersionDetail
from weighbridge.report import page, picture, quality, speed
from weighbridge.report.picture import looks
from weighbridge.report.quality import Point
from weighbridge.report.subject import ORIGINAL, Subject, serving_row

pytestmark = pytest.mark.slow

EVIL = "</title></svg><script>alert(1)</script>$x^2$\u202e & \"'"


@pytest.fixture(scope="module")
def whole() -> str:
    return page.render(subject())


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_the_page_holds_what_a_reader_asks_for(whole: str) -> None:
    """Verdicts with reasons, also of what was refused; who serves what and why; figures of every picture as text."""
    said = text_of(whole)
    for fact in (
        "tickets 7", "ready", "champion", "102.4 MB", "tickets/monday/",
        "99.82% (99.59%)", "rejected", "keeps 71.30% of accuracy", "promised 30%: encoder.embed was left alone",
        "2:4 sparsity runs on CUDA 8.0 and later only", "4.21 ×", "NVIDIA H100 80GB HBM3",
        "this kind was never measured",
        "invalid_noisy", "other processes took 41% of the processors", "encoder.layers.9.down.weight",
        "head.weight (skipped by head)", "accuracy.min", "template:tickets-encoder",
        "prune-channels was calibrated on random inputs", "What the checkpoint was trained on: The registry does not",
    ):  # fmt: skip
        assert fact in said, fact
    assert whole.count("<svg") == 9  # quality, classes, three for each of two kinds, layers


def test_what_serves_where_is_what_the_hosts_say(whole: str) -> None:
    """Variants included, and other versions; a choice is no service, and who is silent serves nothing that is known."""
    said = text_of(whole)
    for row in (
        "gpu-1 NVIDIA H100 80GB HBM3, 9.0, torch 2.13 7 (this one) int8-dynamic live 2 s ago",
        "gpu-2 NVIDIA H100 80GB HBM3, 9.0, torch 2.13 6 original live 3 s ago",
        "gpu-3 NVIDIA H100 80GB HBM3, 9.0, torch 2.13 7 (this one) bf16 silent 80 s ago",
    ):
        assert row in said
    assert "What each kind of host is to get of it" in said


def test_a_noisy_measurement_is_in_no_picture(whole: str) -> None:
    """A busy machine's numbers are no fact: int2-groups has no line in any picture of speed."""
    for drawn in re.findall(r"<svg.*?</svg>", whole, re.DOTALL):
        if 'id="kind' in drawn[:200] or "kind0-" in drawn[:400]:
            assert "int2-groups" not in drawn


def test_what_was_measured_beside_other_work_is_marked(whole: str) -> None:
    """Its ratio stands with the interval, what took the machine beside it; its latencies bear a star everywhere."""
    said = text_of(whole)
    assert "1.42 × (1.35–1.51)" in said
    assert BESIDE in said
    assert re.search(
        r"prune-channels faster 1\.42 × \(1\.35–1\.51\) 1\.51 × \(1\.36–1\.66\) [\d.]+ ms \* [\d.]+ ms \*", said
    )
    assert "prune-channels *" in whole
    assert "* measured beside other work: such figures are no facts" in said


def test_the_page_runs_nothing_and_calls_nobody(whole: str) -> None:
    """It opens from disk and from mail: no script, nothing to fetch, and a policy that forbids both."""
    assert "default-src 'none'" in whole
    assert "<script" not in whole
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', whole)
    assert not re.findall(r"url\((?!#)", whole)
    assert "data:" not in whole


def test_every_picture_can_be_read_aloud_and_ids_are_unique(whole: str) -> None:
    """A title and a description for each; a page of many pictures is still one valid document."""
    ids = re.findall(r' id="([^"]+)"', whole)
    assert len(ids) == len(set(ids))
    named = re.findall(r'<svg [^>]*role="img" aria-labelledby="(\S+) (\S+)">', whole)
    assert len(named) == 9
    assert all(f'<title id="{title}">' in whole and f'<desc id="{said}">' in whole for title, said in named)


def test_colours_follow_the_readers_scheme(whole: str) -> None:
    """What matplotlib drew takes the page's colours: none of the stand-ins is left."""
    assert "prefers-color-scheme: dark" in whole
    assert not re.findall(r"#0[1-6]0\d0\d", whole)


def test_the_same_version_gives_the_same_bytes(whole: str) -> None:
    """So two reports can be compared, and one can be cached."""
    assert page.render(subject()) == whole


def test_names_from_the_bucket_are_text_and_nothing_else() -> None:
    """Models, tensors and classes are named by whoever may write to the bucket."""
    given = subject([EVIL, *NAMES[:3]], model=EVIL)
    bad = given.version.variants[1].model_copy(
        update={"reason": EVIL, "metrics": [Metric(name="f1", value=0.5, slice=f"class={EVIL}")]}
    )
    others = given.version.variants
    version = given.version.model_copy(update={"path": EVIL, "variants": [others[0], bad, *others[2:]]})
    html = page.render(replace(given, version=version))
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("</title>") == 1 + html.count("<svg")
    assert "$x^2$" in html  # as it is written, not as a formula
    assert "/" not in page.file_name(given)


@pytest.mark.parametrize("measured", [False, True])
def test_a_version_with_little_known_says_what_is_not_known(measured: bool) -> None:
    """A version that was rejected at the door, or has only its original, still has a report."""
    original = [Variant(name="original", status="pending")] if measured else []
    version = VersionDetail(
        model="m", number=1, status="quarantined", reason="a pickle", revision=1, created_at=THEN, variants=original
    )
    said = text_of(page.render(Subject(version)))
    assert "quarantined" in said
    assert "a pickle" in said
    assert "No speed was measured" in said
    assert "No gate has judged" in said


def test_what_is_said_of_a_version_is_shown_as_what_it_is(whole: str) -> None:
    """The publisher's words and the files' words, each as theirs, and as text."""
    assert "Its publisher says: commit: 1f3a9c; who: &lt;b&gt;ann&lt;/b&gt;." in whole
    assert "Its files say of themselves: format: pt." in whole


def test_many_layers_become_a_strip() -> None:
    """Two hundred layers by name would be a wall: the picture becomes a heat map, the table keeps them all."""
    html = page.render(subject([f"blocks.{number}.weight" for number in range(200)]))
    assert "the 200 changed tensors" in html
    assert "blocks.123.weight" in html
    assert "data:" not in html


def test_where_nothing_was_evaluated_drift_is_drawn() -> None:
    """Without an evaluation set the picture shows the agreement that decided, by its name."""
    given = subject()
    variants = [
        one.model_copy(update={"metrics": [row for row in one.metrics if row.name == "top1"]})
        for one in given.version.variants
    ]
    seen = quality.kept(replace(given, version=given.version.model_copy(update={"variants": variants})))
    assert seen is not None
    assert seen.words == "rows whose first answer stays the same"


def test_differences_of_nothing_are_drawn_as_nothing() -> None:
    """No axis is so short that a hundred-thousandth is a slope across the picture: kept shares, F1, decibels, rates."""
    from matplotlib.figure import Figure

    figure = Figure()
    linear, log = figure.subplots(1, 2)
    linear.plot([1, 2], [0.99999, 1.0])
    log.set_yscale("log")
    log.plot([1, 2], [5000.0, 5001.0])
    picture.at_least(linear.yaxis, 0.02)
    picture.at_least(log.yaxis, 2.0)
    low, high = linear.get_ylim()
    assert (high - low, low < 0.99999, high > 1) == (pytest.approx(0.02), True, True)
    low, high = log.get_ylim()
    assert high / low == pytest.approx(2)
    before = linear.get_xlim()
    picture.at_least(linear.xaxis, 0.5)
    assert linear.get_xlim() == before  # what is long enough stays
    points = [quality.Point("a", 0.5, 0.99999, None, "ready"), quality.Point(ORIGINAL, 1.0, 1.0, None, "ready")]
    assert quality._floor(quality.Kept("kept", points, [0.99], [])) <= 0.99


def test_a_gate_of_everything_still_has_an_axis() -> None:
    """`keep: 1` leaves no room under the gate; the picture makes some."""
    points = [Point("original", 1.0, 1.0, None, "ready"), Point("half", 0.5, 0.98, None, "rejected")]
    seen = quality.Kept("kept", points, [1.0], ["original"])
    assert "98.0%" in quality.quality_against_size(seen, looks(["original", "half"])).svg


def test_the_front_holds_what_nothing_smaller_matches() -> None:
    """A rejected variant is never on it, however small."""
    points = [
        Point("original", 1.0, 1.0, None, "ready"),
        Point("large and worse", 1.1, 0.99, None, "ready"),
        Point("half", 0.5, 0.999, None, "ready"),
        Point("half, worse", 0.5, 0.99, None, "ready"),
        Point("tiny", 0.1, 0.5, None, "rejected"),
    ]
    assert quality.front(points) == ["half", "original"]


def test_a_distribution_ends_at_one() -> None:
    """The share of requests grows with the latency, up to all of them."""
    row = serving_row(subject().devices[0].facts["original"])
    assert row is not None
    xs, ys = speed.ecdf(row)
    assert xs == sorted(xs)
    assert ys == sorted(ys)
    assert ys[-1] == 1


class _Client:
    """What the registry's client answers; the wire types are the real ones."""

    def __init__(self) -> None:
        self._subject = subject(NAMES[:4])

    def version(self, *_: Any) -> VersionDetail:
        return self._subject.version

    def benchmarks(self, *_: Any) -> Any:
        return list(self._subject.measured[:3])

    def tensors(self, _model: str, _version: int, variant: str) -> Any:
        return list(self._subject.tensors.get(variant, ()))

    def choices(self, *_: Any) -> Any:
        return list(self._subject.choices)

    def hosts(self) -> Any:
        return iter(self._subject.hosts)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session.Session, "client", lambda _: nullcontext(_Client()))


@pytest.mark.usefixtures("registry")
def test_the_command_writes_the_file_and_says_where(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By default MODEL-VERSION.html here; `--json` for scripts."""
    assert main(["report", "tickets", "champion"]) == Exit.OK
    assert capsys.readouterr().out == "tickets-7.html\n"
    assert "tickets 7" in (tmp_path / "tickets-7.html").read_text()
    assert main(["report", "tickets", "-o", "other.html", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == {"path": "other.html", "model": "tickets", "version": 7}


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
@pytest.mark.usefixtures("registry")
def test_a_missing_extra_is_named(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what to install, not a traceback."""
    for name in [one for one in sys.modules if one.startswith("weighbridge.report.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(weighbridge.report, name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["report", "tickets"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "pip install 'weighbridge[report]'" in said
    assert missing in said
