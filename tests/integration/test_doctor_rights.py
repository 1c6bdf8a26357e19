"""The doctor and keys that lack a right: which action is missing, and who needs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.checkpoints import safetensors
from fixtures.refusing import DENIED, Refusing, Rule, refuse
from fixtures.storage import LISTER, READER, WRITER

from weighbridge.cli import main
from weighbridge.cli.exits import Exit
from weighbridge.storage.options import S3Options
from weighbridge.storage.s3 import S3Store
from weighbridge.storage.seaweed import Identity

Doctor = Callable[..., dict[str, Any]]


@pytest.fixture
def doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], s3_store: S3Store
) -> Doctor:
    """Ask the doctor about the bucket with given keys; the answer, and nothing left behind."""
    s3_store.put("digits/a.safetensors", safetensors())
    monkeypatch.chdir(tmp_path)

    def ask(options: S3Options, *arguments: str, code: int, keys: Identity | None = None) -> dict[str, Any]:
        given = {"storage.url": s3_store.url, "storage.s3.endpoint_url": str(options.endpoint_url)}
        pair = (keys.access_key, keys.secret_key) if keys else (options.access_key, options.secret_key)
        for name, secret in zip(("access_key", "secret_key"), pair, strict=True):
            value = secret if isinstance(secret, str) else secret.get_secret_value()  # type: ignore[union-attr]
            monkeypatch.setenv(f"WEIGHBRIDGE_STORAGE__S3__{name.upper()}", value)
        flags = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
        assert main([*flags, "doctor", "--only", "storage", "--json", *arguments]) == code
        assert [info.key for info in s3_store.list()] == ["digits/a.safetensors"]
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["findings"]
        return {one["permission"]: one for one in found if one["permission"]} | {
            "said": " ".join(one["what"] for one in found)
        }

    return ask


def test_the_doctor_finds_nothing_with_all_rights(doctor: Doctor, s3_store: S3Store) -> None:
    """Every call is tried, of both stores, and nothing is left."""
    found = doctor(s3_store._options, code=Exit.OK)
    assert list(found) == ["said"]
    for words in ("unfinished multipart uploads", "in parts", "abort", "copy or rename", "delete", "If-None-Match"):
        assert words in found["said"]


def test_the_doctor_tells_a_reader_who_needs_more(doctor: Doctor, s3_store: S3Store) -> None:
    """Real keys that only read: good for the daemon, not for workers and registry; the action and they are named."""
    assert list(doctor(s3_store._options, "--role", "daemon", keys=READER, code=Exit.OK)) == ["said"]
    found = doctor(s3_store._options, keys=READER, code=Exit.FAILED)
    assert (found["s3:PutObject"]["roles"], found["s3:PutObject"]["ok"]) == (["worker", "registry"], False)
    publisher = doctor(s3_store._options, "--role", "publish", keys=READER, code=Exit.FAILED)
    assert publisher["s3:PutObject"]["roles"] == ["publish"]


@pytest.mark.parametrize(
    ("keys", "role", "missing"),
    [
        (LISTER, "daemon", {"s3:GetObject", "s3:ListBucketMultipartUploads"}),
        (LISTER, "worker", {"s3:GetObject", "s3:PutObject"}),
        (WRITER, "daemon", {"s3:GetObject", "s3:ListBucketMultipartUploads"}),
    ],
)
def test_the_doctor_names_the_rights_that_real_keys_lack(
    keys: Identity, role: str, missing: set[str], doctor: Doctor, s3_store: S3Store
) -> None:
    """Each by its IAM action, and only those of the role."""
    found = doctor(s3_store._options, "--role", role, keys=keys, code=Exit.FAILED)
    assert found.keys() - {"said"} == missing
    assert all(one["roles"] == [role] for name, one in found.items() if name != "said")


@pytest.mark.parametrize(
    ("rule", "missing", "role"),
    [
        (refuse(DENIED, method="GET", query="uploads"), "s3:ListBucketMultipartUploads", "daemon"),
        (refuse(DENIED, method="POST", query="uploads"), "s3:PutObject", "worker"),
        (lambda asked: DENIED if asked.method == "DELETE" and "uploadId" in asked.query else None,
         "s3:AbortMultipartUpload", "worker"),
    ],
)  # fmt: skip
def test_the_doctor_names_a_single_right(
    rule: Rule, missing: str, role: str, doctor: Doctor, refusing: Refusing, refused_options: S3Options
) -> None:
    """One call is refused: one action is named, with who needs it."""
    refusing.rule = rule
    found = doctor(refused_options, "--role", role, code=Exit.FAILED)
    assert found.keys() - {"said"} == {missing}
    assert found[missing]["roles"] == [role]


def test_the_doctor_says_what_a_store_cannot_do(doctor: Doctor, refusing: Refusing, refused_options: S3Options) -> None:
    """No right would help: it is said, with what is done instead, and is nothing wrong."""
    refusing.rule = refuse((501, "NotImplemented"), method="GET", query="uploads")
    assert "cannot list unfinished multipart uploads" in doctor(refused_options, code=Exit.OK)["said"]


def test_wrong_keys_are_no_missing_right(doctor: Doctor, s3_store: S3Store) -> None:
    """The doctor says that the credentials are refused, once, and names no action."""
    found = doctor(s3_store._options, keys=Identity("reader", "wrong"), code=Exit.FAILED)
    assert list(found) == ["said"]
    assert found["said"].count("refused the credentials") == 1


@pytest.mark.parametrize("apart", [False, True])
def test_the_doctor_warns_of_artifacts_where_publishers_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], apart: bool
) -> None:
    """It works, so nothing failed; it says what to do. Silent where they lie apart."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drops").mkdir()
    (tmp_path / "own").mkdir()
    flags = ["--set", f"storage.url={tmp_path / 'drops'}"]
    flags += ["--set", f"storage.artifacts={tmp_path / 'own'}"] if apart else []
    assert main([*flags, "doctor", "--only", "storage", "--json"]) == Exit.OK
    warned = [one for one in json.loads(capsys.readouterr().out)["findings"] if one["warns"]]
    assert len(warned) == (not apart)
    if warned:
        assert "artifacts lie where publishers write" in warned[0]["what"]
        assert "set storage.artifacts" in warned[0]["fix"]
        assert main([*flags, "doctor", "--only", "storage"]) == Exit.OK
        assert "warning" in capsys.readouterr().out
