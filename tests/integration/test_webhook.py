"""Bucket notifications over HTTP, through a real listener."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx
import pytest
from fixtures.checkpoints import safetensors
from fixtures.watched import Watched

from weighbridge.daemon.loops import Health
from weighbridge.daemon.webhook import InsecureWebhook, Listener, Notifications
from weighbridge.registry.db import Database
from weighbridge.storage.events import ObjectEvent
from weighbridge.storage.memory import MemoryStore

TOKEN = "a-token-of-the-webhook"


def minio(*keys: str, bucket: str = "drops") -> dict[str, object]:
    """A notification as MinIO posts it: the keys are URL-encoded."""
    records = [
        {
            "eventName": "s3:ObjectCreated:Put",
            "eventSource": "minio:s3",
            "s3": {"bucket": {"name": bucket}, "object": {"key": key.replace("/", "%2F")}},
        }
        for key in keys
    ]
    return {"EventName": "s3:ObjectCreated:Put", "Key": f"{bucket}/{keys[0]}", "Records": records}


class Ear:
    """A listener with what it heard."""

    def __init__(self, *, token: str | None = TOKEN, health: tuple[Health, ...] = ()) -> None:
        self.heard: list[ObjectEvent] = []
        app = Notifications(self.heard.append, bucket="drops", prefix="team", token=token, health=lambda: health)
        self.listener = Listener(app, "127.0.0.1", 0, token=token)
        self.listener.start()
        self.client = httpx.Client(base_url=self.listener.url, headers={"Authorization": f"Bearer {TOKEN}"})

    def close(self) -> None:
        self.client.close()
        self.listener.stop()


@pytest.fixture
def ear() -> Iterator[Ear]:
    opened = Ear()
    yield opened
    opened.close()


def test_a_notification_is_a_hint_with_the_stores_own_key(ear: Ear) -> None:
    """Of our bucket, below our prefix, decoded; others give nothing and are no error."""
    answer = ear.client.post("/", json=minio("team/digits/run 1/a.safetensors", "elsewhere/x.safetensors"))
    assert (answer.status_code, answer.json()) == (200, {"hints": 1})
    assert [event.key for event in ear.heard] == ["digits/run 1/a.safetensors"]
    assert ear.client.post("/", json=minio("team/a", bucket="other")).json() == {"hints": 0}
    assert ear.client.post("/", json={"Event": "s3:TestEvent", "Bucket": "drops"}).json() == {"hints": 0}


def test_without_the_token_nothing_is_heard(ear: Ear) -> None:
    """A wrong and a missing one are 401, and the answer says which setting."""
    for headers in ({"Authorization": "Bearer no"}, {"Authorization": ""}):
        answer = ear.client.post("/", json=minio("team/digits/a.safetensors"), headers=headers)
        assert answer.status_code == 401
        assert "daemon.webhook_token" in answer.json()["title"]
    assert ear.heard == []


def test_what_is_no_notification_is_a_clear_400(ear: Ear) -> None:
    """No JSON, another shape, a record without its bucket."""
    for body, said in ((b"\xff", "no JSON"), (b"{}", "known bucket notification"), (b'{"Records": [{}]}', "eventName")):
        answer = ear.client.post("/", content=body)
        assert answer.status_code == 400
        assert said in answer.json()["title"]
    assert ear.heard == []


def test_a_huge_body_is_refused(ear: Ear) -> None:
    """By its declared length, and by what comes where none is declared."""
    declared = ear.client.post("/", content=b"x" * (2 << 20))
    assert declared.status_code == 413
    streamed = ear.client.post("/", content=iter([b"x" * (1 << 20)] * 2))
    assert streamed.status_code == 413


def test_other_paths_and_methods(ear: Ear) -> None:
    """GET / answers (a store asks before it accepts a target); the rest says what is possible."""
    assert ear.client.get("/").status_code == 200
    assert ear.client.put("/", content=b"{}").status_code == 405
    assert ear.client.get("/admin").status_code == 404


@pytest.mark.parametrize(
    ("health", "status"),
    [
        ((Health("intake", 0.0), Health("listing", 5.0)), 200),
        ((Health("intake", 0.0), Health("listing", 500.0)), 503),
        ((Health("intake", 0.0, "AccessDenied: wrong key"),), 503),
    ],
)
def test_health_says_whether_the_loops_advance(health: tuple[Health, ...], status: int) -> None:
    """Without a token: nothing secret is in it. A late or failing loop is 503, named."""
    ear = Ear(health=health)
    try:
        answer = httpx.get(f"{ear.listener.url}healthz")
        assert answer.status_code == status
        assert set(answer.json()["loops"]) == {each.name for each in health}
    finally:
        ear.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_it_refuses_to_start_without_a_token(host: str) -> None:
    """Anybody on the network, every user of the machine and every page that they open could send hints."""
    app = Notifications(lambda event: None, bucket="drops")
    with pytest.raises(InsecureWebhook, match="webhook_token"):
        Listener(app, host, 0, token=None)


def test_a_storm_of_notifications_is_one_version(sqlite_url: str) -> None:
    """Posted by several clients at once, doubled and false: one checkpoint, one version."""
    db = Database(sqlite_url)
    watched = Watched(MemoryStore(), db)
    watched.store.put("digits/a.safetensors", safetensors())
    app = Notifications(watched.intake.tell, bucket="drops", token=TOKEN)
    listener = Listener(app, "127.0.0.1", 0, token=TOKEN)
    listener.start()
    body = json.dumps(minio("digits/a.safetensors", "digits/gone.safetensors"))

    def post() -> None:
        with httpx.Client(base_url=listener.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            for _ in range(20):
                assert client.post("/", content=body).status_code == 200

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listener.stop()
    watched.settle()
    assert len(watched.versions()) == 1
    db.close()
