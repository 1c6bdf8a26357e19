"""Every part of a store's URL is used or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weighbridge.storage.errors import StorageError
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.s3 import S3Store
from weighbridge.storage.settings import StorageSettings
from weighbridge.storage.urls import open_store


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("file:///x/exp#1", "%23"),
        ("file:///x/exp#", "%23"),
        ("file:///x/exp?a=1", "%3F"),
        ("file:///x/exp?", "%3F"),
        ("file://user@localhost/x", "user"),
        ("file://localhost:80/x", "port"),
        ("file://host/x", "three slashes"),
        ("file://", "no path"),
        ("file:/x/exp", "needs '//'"),
        ("file:x", "needs '//'"),
        ("s3:bucket/runs", "needs '//'"),
        ("s3://b/runs#7", "storage.prefix"),
        ("s3://bucket/runs#7", "storage.prefix"),
        ("s3://bucket/runs#", "storage.prefix"),
        ("s3://bucket/runs?versionId=3", "storage.prefix"),
        ("s3://bucket?", "storage.prefix"),
        ("s3://key:secret@bucket/x", "storage.s3"),
        ("s3://bucket:9000/x", "endpoint_url"),
        ("s3:///x", "no bucket"),
        ("s3://bu cket/x", "no bucket"),
        ("s3://bucket//runs", "empty part"),
        ("s3://bucket/runs//", "empty part"),
        ("s3://bucket/a%20b", "not decoded"),
        ("s3://bucket/runs\n", "control characters"),
        ("s3://bucket/ru\tns", "control characters"),
        ("s3://bucket/runs ", "spaces"),
        ("memory://x#1", "storage.prefix"),
        ("memory://", "no name"),
        ("http://host/x", "no kind of store"),
        ("gs://bucket/x", "no kind of store"),
        ("s3://[bucket/x", "host"),
    ],
)
def test_a_part_without_a_meaning_is_refused(url: str, advice: str) -> None:
    """Dropped, it would open another folder or prefix; the error says how to write it, and repeats no secret."""
    with pytest.raises(StorageError, match=advice) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["exp#1", "a b", "a;v=1", "50%", "a%20b", "was?", "ü", "e\u0301"])
def test_every_name_of_a_folder_can_be_said(name: str, tmp_path: Path) -> None:
    """As a plain path, and as the URL that the folder itself gives."""
    store = open_store(str(tmp_path / name), create=True)
    assert isinstance(store, FolderStore)
    assert os.listdir(tmp_path) == [name]
    assert open_store(store.url).check() is None
    assert open_store(store.url).url == store.url


def test_a_file_url_is_decoded_to_bytes(tmp_path: Path) -> None:
    """Also where the name is no UTF-8; a NUL is none."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    open_store(f"{tmp_path.as_uri()}/%FF").check()
    with pytest.raises(StorageError, match="NUL"):
        open_store(f"{tmp_path.as_uri()}/a%00b")


def test_a_prefix_counts_every_character(tmp_path: Path) -> None:
    """What a URL cannot say, `storage.prefix` says, for publishers too."""
    for prefix in ("runs#7", "a%20b", "was?"):
        store = StorageSettings(url="s3://bucket", prefix=prefix).open_models()
        assert isinstance(store, S3Store)
        assert store.prefix == f"{prefix}/"
        folder = StorageSettings(url=str(tmp_path), prefix=prefix).open_models()
        assert isinstance(folder, FolderStore)
        assert folder.root == tmp_path / prefix
    nested = open_store("s3://bucket/team/", below="runs")
    assert isinstance(nested, S3Store)
    assert nested.prefix == "team/runs/"
