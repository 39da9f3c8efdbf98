"""A message that is done with is let go of, though the server could not be told."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Consumer, Producer, Queue

from tests.servers import Server
from toolkit.cluster.amqp import PatientConnection

#: Seconds until the server counts as frozen.
TIMEOUT_S = 1


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def drained(connection: PatientConnection, got: list[Any], n: int) -> bool:
    """Whether that many messages have come within a few seconds."""
    for _ in range(4):
        if len(got) >= n:
            return True
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=TIMEOUT_S)
    return len(got) >= n


@pytest.mark.slow
def test_worker_takes_the_next_message_after_an_acknowledgement_that_met_a_frozen_server(
    server: Server,
) -> None:
    options = {"socket_timeout": TIMEOUT_S}
    url = f"redis://127.0.0.1:{server.port}/0"
    with PatientConnection(url, transport_options=options) as connection:
        channel, got = connection.channel(), []
        channel.basic_qos(0, 1, False)
        queue = Queue("q", channel=channel)
        queue.declare()
        for body in ("one", "two"):
            Producer(channel).publish(body, routing_key="q")
        with Consumer(channel, [queue], on_message=got.append):
            assert drained(connection, got, 1)

            server.freeze()
            # As Celery does, which logs the error and goes on.
            got[0].ack_log_error(logging.getLogger(__name__), connection.connection_errors)
            server.thaw()

            assert drained(connection, got, 2)
