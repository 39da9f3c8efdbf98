"""What the queues hold, for people and for programs; and the one way to empty them."""

from __future__ import annotations

import time
from typing import Any

from toolkit.cluster import mirror, queues
from toolkit.cluster.connection import connect, connect_broker, mapped_errors, resolve_address
from toolkit.cluster.protocol import Keys
from toolkit.cluster.registry import list_workers
from toolkit.config import Settings

#: Seconds for which a cancelled run may take to remove its own messages.
CANCEL_WAIT_S = 10.0


def queue_overview(settings: Settings) -> dict[str, Any]:
    """Every queue and every message, the oldest first.

    Returns:
        ``ready`` and ``unacked``: messages that wait, and that workers hold; ``queues``: the
        same for each; ``messages``: of each where it is and whose; ``commands``: the lines of
        redis-cli that show the same.

    Raises:
        ServerError: If the server cannot be asked.
    """
    address, keys = resolve_address(settings), Keys(settings.namespace)
    with mapped_errors(address), connect_broker(address) as broker, connect(address) as backend:
        found = queues.queues(broker, keys)
        known = {depth.queue for depth in found}
        consumed = {name for view in list_workers(backend, keys) for name in view.info.queues}
        # An empty list is no key: what is consumed and holds nothing is known from the workers.
        found += [queues.depth(broker, keys, name) for name in sorted(consumed - known)]
        waiting = list(queues.messages(broker, keys))
        alive = {run: bool(backend.exists(keys.run(run))) for run in {m.run_id for m in waiting}}
    return {
        "ready": sum(depth.ready for depth in found),
        "unacked": sum(depth.unacked for depth in found),
        "queues": [
            {"queue": depth.queue, "ready": depth.ready, "unacked": depth.unacked}
            for depth in found
        ],
        "messages": [
            {
                "where": message.where,
                "run": message.run_id,
                "batch": message.batch_id,
                "attempt": message.attempt,
                "age_s": message.age_s,
                "owner": "alive" if alive[message.run_id] else "gone",
            }
            for message in waiting
        ],
        "commands": [
            line for depth in found for line in queues.show_lines(address, keys, depth.queue)
        ],
    }


def purge(settings: Settings, run_id: str | None = None) -> list[dict[str, Any]]:
    """Remove what dead runs left on the server.

    Args:
        settings: Server and namespace.
        run_id: A run that is cancelled first; its own client removes its messages as it
            ends. What is left after :data:`CANCEL_WAIT_S` is removed here.

    Returns:
        The runs of which something was removed, with the number of their messages.

    Raises:
        ServerError: If the server cannot be asked.
    """
    address, keys = resolve_address(settings), Keys(settings.namespace)
    removed: dict[str, int] = {}
    with mapped_errors(address), connect_broker(address) as broker, connect(address) as backend:
        if run_id is not None:
            mirror.request_cancel(backend, keys, run_id)
            deadline = time.monotonic() + CANCEL_WAIT_S
            while backend.exists(keys.run(run_id)) and time.monotonic() < deadline:
                time.sleep(0.1)  # the client looks once a second; nothing tells us
            removed[run_id] = queues.remove_run(broker, keys, run_id)
            queues.purge_run_keys(backend, keys, run_id)
        for dead, n in queues.purge_dead(broker, backend, keys).items():
            removed[dead] = removed.get(dead, 0) + n
    return [{"run": run, "messages": n} for run, n in removed.items()]
