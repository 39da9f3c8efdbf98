"""The Celery app and nothing else; light enough for the monitor and Flower to import.

Law: no result backend, no pickle, no retry inside Celery, and never its shared default queue:
who sends decides what a lost message means, and learns of it at once.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from celery import Celery
from kombu.serialization import disable_insecure_serializers

from toolkit import config
from toolkit.cluster.connection import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S, resolve_address
from toolkit.cluster.protocol import IDLE_QUEUE, Keys
from toolkit.config import Settings

#: Seconds a worker waits for an answer: it has nothing better to do, and a busy server is
#: no reason to drop the connection.
WORKER_ANSWER_TIMEOUT_S = 5.0

#: Seconds a pool process may take until it is up; it loads no model in that time.
PROCESS_START_S = 120

#: Seconds a worker that is asked to stop may take to finish its batch.
SOFT_SHUTDOWN_S = 20.0


def create_app(settings: Settings, *, is_worker: bool = False) -> Celery:
    """Make the app for one server.

    Args:
        settings: Server, namespace and limits.
        is_worker: Whether it will consume, or only send and look.

    Raises:
        SettingError: If the address of the server is none.
    """
    amqp = "toolkit.cluster.amqp:PatientAMQP"
    app = Celery("toolkit", set_as_current=is_worker, amqp=amqp)
    disable_insecure_serializers()  # type: ignore[no-untyped-call]
    address = resolve_address(settings)
    answer_timeout_s = WORKER_ANSWER_TIMEOUT_S if is_worker else ANSWER_TIMEOUT_S
    app.conf.update(
        broker_url=address.broker_url,
        result_backend=None,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        event_serializer="json",
        task_default_queue=IDLE_QUEUE,
        task_create_missing_queues=True,
        task_publish_retry=False,
        broker_connection_timeout=1.0,
        # Flower asks every worker at once, over two connections each: with too few, each question
        # waits for ever for the other's.
        broker_pool_limit=None if is_worker else 4,
        broker_transport_options=_transport(settings, answer_timeout_s),
    )
    if is_worker:
        app.conf.update(_worker(settings))
        # A name, not the class: that room is above this one.
        app.steps["worker"].add("toolkit.worker.bootsteps:Presence")
    return app


@functools.cache
def worker_app() -> Celery:
    """The app that ``celery -A toolkit`` finds, with the settings as they are."""
    return create_app(config.resolve(), is_worker=True)


def _transport(settings: Settings, answer_timeout_s: float) -> dict[str, Any]:
    return {
        "global_keyprefix": Keys(settings.namespace).prefix,
        # The shortest of all participants counts: it must be the same everywhere.
        "visibility_timeout": settings.visibility_timeout_s,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        # Without it a frozen or half-open server hangs its clients for ever.
        "socket_timeout": answer_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 10,
        # A publish that timed out may have happened.
        "retry_on_timeout": False,
        "max_retries": 1,
        "interval_start": 0,
        "interval_step": 0.1,
        "interval_max": 0.1,
        "client_name": "toolkit",
    }


def _worker(settings: Settings) -> dict[str, Any]:
    return {
        "include": ["toolkit.worker.tasks", "toolkit.worker.lifecycle"],
        # One model in memory, whatever the number of cores.
        "worker_concurrency": 1,
        "worker_pool": "solo" if sys.platform == "win32" else "prefork",
        "worker_pool_start_method": "spawn",
        "worker_proc_alive_timeout": PROCESS_START_S,
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        # True would hand a batch that kills its process out for ever.
        "task_reject_on_worker_lost": False,
        "task_acks_on_failure_or_timeout": True,
        # The last resort, of prefork alone; the others have it in toolkit.worker.limits.
        "task_time_limit": settings.celery_task_time_limit,
        "broker_connection_retry_on_startup": True,
        "broker_connection_retry": True,
        "broker_connection_max_retries": None,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_send_task_events": True,
        "worker_soft_shutdown_timeout": SOFT_SHUTDOWN_S,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
    }


def __getattr__(name: str) -> Any:
    if name == "app":  # where `celery -A toolkit.cluster.app` looks
        return worker_app()
    raise AttributeError(name)
