"""The Celery app: how job ids travel. Nothing here is relied upon for correctness; the job's row and its lease are.

Free of torch and of the task's body, so that senders use the same app. Settings and their reasons: docs/decisions.md.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from celery import Celery
from kombu.entity import Exchange, Queue

from weighbridge.registry.settings import BrokerSettings
from weighbridge.workers.settings import WorkerSettings

TASK = "weighbridge.run_job"
QUEUES = ("cpu", "variants", "gpu", "control")
"""Those of every installation; a kind of device has one of its own besides (registry.lifecycle.kind_queue)."""
_CONNECT_SECONDS = 1.0
_KILL_GRACE = 30.0
"""Seconds between the soft and the hard end of a job over its time: enough to record why."""


class InsecureBroker(ValueError):
    """A broker that anybody on the network could write to."""


def queue_name(broker: BrokerSettings, queue: str) -> str:
    """The broker's name of a queue: `weighbridge.cpu`."""
    return f"{broker.channel}.{queue}"


def check_broker(broker: BrokerSettings) -> None:
    """Raise InsecureBroker for one that is reachable off this machine without a password."""
    parts = urlsplit(broker.url.get_secret_value())
    if parts.scheme in ("memory", "redis+socket", "unix") or parts.password:
        return
    host = parts.hostname or "localhost"
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise InsecureBroker(
            f"broker {host}: a broker off this machine needs a password (redis://:PASSWORD@{host}), or anybody on the "
            "network could start jobs and forge wake-ups"
        )


def queue_of(broker: BrokerSettings, queue: str) -> Queue:
    """How a queue is declared, by those who send to it as by those who take from it."""
    name = queue_name(broker, queue)
    exchange = Exchange(broker.channel, type="direct", durable=True)  # type: ignore[no-untyped-call]
    return Queue(name, exchange, routing_key=name, durable=True)  # type: ignore[no-untyped-call]


def make_app(broker: BrokerSettings, worker: WorkerSettings | None = None, kinds: Sequence[str] = ()) -> Celery:
    """Make the app of a sender (`worker` None) or of a worker, which may take from queues of `kinds` of devices too.

    Raises InsecureBroker.
    """
    check_broker(broker)
    worker = worker or WorkerSettings()
    app = Celery("weighbridge", broker=broker.url.get_secret_value(), set_as_current=False)
    default = queue_name(broker, QUEUES[0])
    app.conf.update(
        task_queues=[queue_of(broker, name) for name in (*QUEUES, *kinds)],
        task_default_queue=default,
        task_default_exchange=broker.channel,
        task_default_routing_key=default,
        task_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        task_publish_retry=False,
        task_soft_time_limit=worker.stage_timeout,
        task_time_limit=worker.stage_timeout + _KILL_GRACE,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_soft_shutdown_timeout=worker.shutdown_seconds,
        worker_enable_soft_shutdown_on_idle=True,
        worker_proc_alive_timeout=120.0,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_pool_start_method="fork",  # the parent never touches CUDA, so its children may
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=_CONNECT_SECONDS,
        broker_transport_options=_transport(broker, worker),
    )
    return app


def _transport(broker: BrokerSettings, worker: WorkerSettings) -> dict[str, object]:
    return {
        "visibility_timeout": max(86_400, int(2 * worker.stage_timeout)),
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "unacked_key": f"{broker.channel}.unacked",
        "unacked_index_key": f"{broker.channel}.unacked_index",
        "unacked_mutex_key": f"{broker.channel}.unacked_mutex",
        "socket_timeout": 5,  # a poll is answered within one second; closing waits for the answer of a dead one
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_keepalive": True,
        "health_check_interval": 25,
        "retry_on_timeout": True,
    }
