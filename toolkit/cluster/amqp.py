"""How Celery's own connections behave over a server that goes away and comes back."""

from __future__ import annotations

from typing import Any

from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis, virtual

#: Most seconds between two tries to connect again. Celery's own steps grow to 30 s, and after
#: a long outage a worker would stay away for as long.
MOST_RECONNECT_S = 2.0


class PatientQoS(redis.QoS):
    """Lets go of a message that is done with also when the server could not be told.

    Celery swallows the error of an acknowledgement, and kombu would go on counting the message
    as in hand: with one message at a time a worker would then beat, say that it is ready, and
    never take a batch again. What the server keeps is removed by the client at its end, or
    found to be stale.
    """

    def ack(self, delivery_tag: str) -> None:
        """See :class:`kombu.transport.redis.QoS`."""
        try:
            self._remove_from_indices(delivery_tag).execute()  # type: ignore[no-untyped-call]
        finally:
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]


class PatientChannel(redis.Channel):
    """Kombu's, with :class:`PatientQoS`."""

    QoS = PatientQoS


class PatientTransport(redis.Transport):
    """Kombu's, with :class:`PatientChannel`."""

    Channel = PatientChannel


class PatientConnection(Connection):
    """A connection that tries again every two seconds, for ever."""

    def get_transport_cls(self) -> type[virtual.Transport]:
        """See :class:`kombu.Connection`."""
        return PatientTransport

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        """See :class:`kombu.Connection`."""
        kwargs.setdefault("interval_max", MOST_RECONNECT_S)
        return super().ensure_connection(*args, **kwargs)  # type: ignore[no-untyped-call]


class PatientAMQP(AMQP):  # type: ignore[misc]  # Celery has no types
    """Celery's, with connections of ours."""

    Connection = PatientConnection
