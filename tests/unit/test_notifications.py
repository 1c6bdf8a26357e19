"""Bucket notifications in every shape that stores send them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge.storage.events import Kind, ObjectEvent
from weighbridge.storage.notifications import MAX_BODY, MalformedNotification, parse


def record(
    key: str, name: str = "s3:ObjectCreated:Put", bucket: str = "models", source: str = "minio:s3"
) -> dict[str, Any]:
    return {
        "eventVersion": "2.0", "eventSource": source, "awsRegion": "", "eventTime": "2026-11-23T10:00:00.000Z",
        "eventName": name, "userIdentity": {"principalId": "trainer"}, "requestParameters": {"sourceIPAddress": "::1"},
        "responseElements": {"x-amz-request-id": "17A"},
        "s3": {
            "s3SchemaVersion": "1.0", "configurationId": "Config",
            "bucket": {"name": bucket, "ownerIdentity": {"principalId": "x"}, "arn": f"arn:aws:s3:::{bucket}"},
            "object": {"key": key, "size": 1024, "eTag": "d41d8cd98f00b204e9800998ecf8427e", "sequencer": "17A0F1"},
        },
    }  # fmt: skip


MINIO = {
    "EventName": "s3:ObjectCreated:CompleteMultipartUpload",
    "Key": "models/checkpoints/digits/run 1+2/model.safetensors",
    "Records": [record("checkpoints%2Fdigits%2Frun+1%2B2%2Fmodel.safetensors")],
}
AWS = {"Records": [record("checkpoints/digits/run+1%2B2/model.safetensors", "ObjectCreated:Put", source="aws:s3")]}
SNS = {"Type": "Notification", "MessageId": "1", "TopicArn": "arn:aws:sns:…", "Message": json.dumps(AWS)}
EVENTBRIDGE = {
    "version": "0", "id": "17793124", "detail-type": "Object Created", "source": "aws.s3", "account": "111122223333",
    "detail": {
        "version": "0", "bucket": {"name": "models"}, "reason": "PutObject",
        "object": {"key": "checkpoints/digits/run 1+2/model.safetensors", "size": 5, "etag": "b1", "version-id": "v1"},
    },
}  # fmt: skip
MINIO_LIST = [{"Event": [record("checkpoints%2Fdigits%2Frun+1%2B2%2Fmodel.safetensors")], "EventTime": "2026"}]


@pytest.mark.parametrize(
    ("body", "source"),
    [(MINIO, "minio"), (AWS, "aws"), (SNS, "aws"), (EVENTBRIDGE, "eventbridge"), (MINIO_LIST, "minio")],
)
def test_every_shape_names_the_same_object(body: Any, source: str) -> None:
    """Keys are decoded once and lose the prefix; bytes and parsed bodies are alike."""
    expected = [ObjectEvent(Kind.CREATED, "digits/run 1+2/model.safetensors", source)]
    assert parse(body, bucket="models", prefix="checkpoints/") == expected
    assert parse(json.dumps(body).encode(), bucket="models", prefix="checkpoints") == expected


def test_ceph_gives_both_readings_of_a_key() -> None:
    """Some versions of Ceph encode keys and some do not: both are looked at."""
    body = {"Records": [record("a+b.safetensors", "ObjectCreated:Put", source="ceph:s3")]}
    assert {event.key for event in parse(body, bucket="models")} == {"a b.safetensors", "a+b.safetensors"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("s3:ObjectCreated:Copy", Kind.CREATED), ("ObjectRestore:Completed", Kind.CREATED),
     ("s3:ObjectRemoved:DeleteMarkerCreated", Kind.REMOVED), ("LifecycleExpiration:Delete", Kind.REMOVED),
     ("s3:ObjectAccessed:Get", None), ("s3:BucketCreated:*", None)],
)  # fmt: skip
def test_kinds_of_events(name: str, kind: Kind | None) -> None:
    """Creation and removal count; reads and other events are passed over."""
    events = parse({"Records": [record("a", name)]}, bucket="models")
    assert [event.kind for event in events] == ([kind] if kind else [])


@pytest.mark.parametrize(
    "body",
    [{"Service": "Amazon S3", "Event": "s3:TestEvent", "Time": "2026", "Bucket": "models"},
     SNS | {"Message": json.dumps({"Event": "s3:TestEvent"})},
     {"Type": "SubscriptionConfirmation", "SubscribeURL": "http://169.254.169.254/"},
     {"Records": []}, [], EVENTBRIDGE | {"detail-type": "Object Tags Added"}],
)  # fmt: skip
def test_test_events_and_the_like_give_nothing(body: Any) -> None:
    """Set-up messages are harmless; a confirmation's URL is never visited."""
    assert parse(body, bucket="models") == []


def test_other_buckets_prefixes_and_keys_that_are_none_give_nothing() -> None:
    """Foreign, forged and folder-marker keys are passed over, their neighbours are not; duplicates are one."""
    keys = [
            "..%2F..%2Fetc%2Fpasswd", "checkpoints/../x", "%2Fetc%2Fpasswd", "checkpoints/digits/", "other/a",
            "checkpoints/", "checkpoints/a%00", "checkpoints/a%5Cb", "checkpoints/good",
            "checkpoints%2Fgood"]  # fmt: skip
    body = {"Records": [record(key) for key in keys] + [record("checkpoints/b", bucket="models2")]}
    assert parse(body, bucket="models", prefix="checkpoints") == [ObjectEvent(Kind.CREATED, "good", "minio")]


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"", "no JSON"), (b"\xff", "no JSON"), (b"[" * 100_000, "no JSON"), (b"5", "not the shape"),
     (b"{}", "not the shape"),
     (b'{"a": 1}', r"not the shape of any known bucket notification: \['a'\]"), (b"x" * (MAX_BODY + 1), "at most"),
     (b'{"Records": [1]}', "no eventName"),
     (b'{"Records": [{"eventName": "s3:ObjectCreated:Put"}]}', "no s3.bucket.name"),
     (json.dumps({"Records": [record("a") | {"s3": {"bucket": {"name": "b"}}}]}).encode(), "no s3.object.key"),
     (b'[1]', "something else"), (b'{"detail-type": "Object Created", "detail": {}}', "no object.key"),
     (json.dumps(SNS | {"Message": json.dumps(SNS)}).encode(), "another SNS message"),
     (json.dumps(SNS | {"Message": "hello"}).encode(), "no JSON")],
)  # fmt: skip
def test_unknown_shapes_say_what_is_missing(body: bytes, reason: str) -> None:
    """A body that is no notification is an error with a reason."""
    with pytest.raises(MalformedNotification, match=reason):
        parse(body, bucket="models")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.just("s3:ObjectCreated:Put"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["Records", "Event", "Type", "Message", "s3", "bucket", "object", "name", "key", "detail",
                         "detail-type", "eventName"]) | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(json_values)
@settings(max_examples=200, deadline=None)
def test_no_json_crashes_the_parser(body: Any) -> None:
    """Any JSON gives events or MalformedNotification: no other end."""
    with contextlib.suppress(MalformedNotification):
        assert all(isinstance(event, ObjectEvent) for event in parse(json.dumps(body).encode(), bucket="models"))
