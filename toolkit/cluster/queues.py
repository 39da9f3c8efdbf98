"""What waits in the queues and what workers hold; and how exactly that is taken away.

Law: only messages and keys of runs of this namespace are ever removed, each by its id. Queues
that are not ours, messages whose id is not a batch's and other namespaces are left alone, also
when everything lies in one database.

A message of Celery's is JSON whose ``headers.id`` is ``{run}/{batch}/{attempt}``. It waits in
the list of its queue (one list for each priority, the next one at the right end), and from
there moves into the hash ``unacked`` until its worker acknowledges it. Functions here raise
what the client library raises; callers wrap them in
:func:`toolkit.cluster.connection.mapped_errors`.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import redis

from toolkit.cluster.connection import Address
from toolkit.cluster.protocol import Keys
from toolkit.cluster.reading import (
    answers,
    json_object,
    json_value,
    literal,
    pass_over_wrong_type,
    seconds,
    shown,
)

#: Priorities for which Celery has a list of their own; 0 goes first.
PRIORITIES = (0, 3, 6, 9)

#: Seconds between two searches of a whole database for queues.
SEARCH_EVERY_S = 60.0

#: Messages or keys that one command asks for.
_PAGE = 500

_SEPARATOR = "\x06\x16"
_QUEUE = re.compile(r"v[0-9]+\.[0-9a-z]+")
_TASK_ID = re.compile(r"([^/]+)/([0-9]{1,18})/([0-9]{1,18})")


@dataclasses.dataclass(frozen=True, slots=True)
class QueueDepth:
    """How many messages a queue has.

    Attributes:
        queue: Its name, without the namespace.
        by_priority: Messages that wait, for each of :data:`PRIORITIES`.
        unacked: Messages that workers hold.
    """

    queue: str
    by_priority: dict[int, int]
    unacked: int

    @property
    def ready(self) -> int:
        """Messages that wait."""
        return sum(self.by_priority.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One attempt at a batch, on its way.

    Attributes:
        queue: Its queue, without the namespace.
        id: Id of the Celery task.
        run_id: Its run; empty if the id is not a batch's.
        batch_id: Its batch.
        attempt: Its attempt.
        where: ``ready`` waits for a worker, ``unacked`` is held by one.
        age_s: Seconds since it was sent, or taken by a worker. To be shown, never to decide
            by: the clock of whoever sent or took it goes into it. ``None`` if it does not say.
    """

    queue: str
    id: str
    run_id: str
    batch_id: int
    attempt: int
    where: Literal["ready", "unacked"]
    age_s: float | None


def depth(broker: redis.Redis, keys: Keys, queue: str) -> QueueDepth:
    """How many messages one queue has."""
    return _depths(broker, keys, [queue], _held(broker, keys))[0]


def queues(broker: redis.Redis, keys: Keys) -> list[QueueDepth]:
    """Every queue of this namespace that has messages, by name."""
    return KnownQueues().depths(broker, keys)


class KnownQueues:
    """The queues of a namespace, for whoever looks at them again and again.

    A search goes over every key of the database, others' too, so there is one a minute; what
    workers consume or hold is known without one.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._due_at = 0.0

    def depths(
        self, broker: redis.Redis, keys: Keys, consumed: Iterable[str] = ()
    ) -> list[QueueDepth]:
        """Every queue that has messages, by name.

        Args:
            broker: The same server each time.
            keys: The same namespace each time.
            consumed: Queues that exist whether they have messages or not.
        """
        if time.monotonic() >= self._due_at:
            self._names = {queue for queue, _, _ in _lists(broker, keys)}
            self._due_at = time.monotonic() + SEARCH_EVERY_S
        held = _held(broker, keys)
        self._names |= {name for name in (*held, *consumed) if _QUEUE.fullmatch(name)}
        found = _depths(broker, keys, sorted(self._names), held)
        return [depth for depth in found if depth.ready or depth.unacked]


def messages(broker: redis.Redis, keys: Keys) -> Iterator[Message]:
    """Every message, the oldest first: those that workers hold, then those that wait."""
    held = (message for _, message in _unacked(broker, keys))
    yield from sorted(held, key=lambda message: -(message.age_s or 0.0))
    for queue, _, key in sorted(_lists(broker, keys)):
        waiting = [message for _, message in _waiting(broker, key, queue)]
        yield from reversed(waiting)


def is_waiting(broker: redis.Redis, keys: Keys, queue: str, task_id: str) -> bool:
    """Whether a message waits in its queue, so that no worker has taken it."""
    lists = (keys.prefix + _list_name(queue, priority) for priority in PRIORITIES)
    waiting = (message for key in lists for _, message in _waiting(broker, key, queue))
    return any(message.id == task_id for message in waiting)


def remove_run(broker: redis.Redis, keys: Keys, run_id: str) -> int:
    """Remove the messages of one run, and nothing else.

    Returns:
        How many there were.
    """
    return sum(_remove(broker, keys, lambda found: found & {run_id}).values())


def purge_dead(broker: redis.Redis, backend: redis.Redis, keys: Keys) -> dict[str, int]:
    """Remove the messages and keys of runs whose client is gone.

    A run lives while its key :meth:`~toolkit.cluster.protocol.Keys.run` does: a client writes
    that before it writes or sends anything else.

    Returns:
        The runs of which something was left → how many messages of it were removed.
    """
    removed = _remove(broker, keys, lambda found: dead_runs(backend, keys, found))
    for page in _pages(backend, literal(keys.run("")) + "*"):
        owner = {key: shown(key)[len(keys.run("")) :].partition(":")[0] for key in page}
        dead = dead_runs(backend, keys, set(owner.values()))
        left = [key for key in page if owner[key] in dead]
        if left:
            backend.unlink(*left)
        for key in left:
            removed.setdefault(owner[key], 0)
    return removed


def dead_runs(backend: redis.Redis, keys: Keys, run_ids: Iterable[str]) -> set[str]:
    """Those of some runs whose client is gone; see :func:`purge_dead`."""
    asked = list(run_ids)
    pipe = backend.pipeline(transaction=False)
    for run_id in asked:
        pipe.exists(keys.run(run_id))
    return {run_id for run_id, lives in zip(asked, answers(pipe), strict=True) if not lives}


def purge_run_keys(backend: redis.Redis, keys: Keys, run_id: str) -> None:
    """Remove every key of one run."""
    backend.unlink(keys.run(run_id), keys.cancel(run_id))
    for page in _pages(backend, literal(keys.run(run_id)) + ":*"):
        backend.unlink(*page)


def show_lines(address: Address, keys: Keys, queue: str) -> list[str]:
    """What to type into bash to see the same: lengths, the oldest message, what is held."""
    cli = redis_cli(address, database=address.broker_db)
    lists = [_quoted(keys.prefix + _list_name(queue, priority)) for priority in PRIORITIES]
    lines = [f"{cli} LLEN {name}" for name in lists]
    lines += [
        f"{cli} LRANGE {lists[0]} -1 -1",
        f"{cli} HLEN {_quoted(keys.prefix + 'unacked')}",
        f"{cli} ZRANGE {_quoted(keys.prefix + 'unacked_index')} 0 0 WITHSCORES",
    ]
    if urlsplit(address.url).password:
        lines.insert(0, "read -rs REDISCLI_AUTH && export REDISCLI_AUTH  # type the password")
    return lines


def redis_cli(address: Address, *, database: int | None = None, asks: bool = False) -> str:
    """How the server's own client is started from bash.

    Args:
        address: The server.
        database: Number of the database, where it matters.
        asks: Whether it is to ask for the password; else it takes ``REDISCLI_AUTH``.
    """
    parts = urlsplit(address.url)
    options = parse_qs(parts.query)
    if parts.scheme == "unix":
        words = ["redis-cli", "-s", unquote(parts.path)]
    else:
        words = ["redis-cli", "-h", str(parts.hostname), "-p", str(parts.port or 6379)]
    if database is not None:
        words += ["-n", str(database)]
    if parts.username:
        words += ["--user", unquote(parts.username)]
    if asks and parts.password:
        words.append("--askpass")
    if address.is_tls:
        words.append("--tls")
        for authority in options.get("ssl_ca_certs", ()):
            words += ["--cacert", authority]
    return shlex.join(words)


def _quoted(name: str) -> str:
    """A name as bash takes it; its control characters by their numbers."""
    if name.isprintable():
        return shlex.quote(name)
    escaped = name.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped) + "'"


def _list_name(queue: str, priority: int) -> str:
    return f"{queue}{_SEPARATOR}{priority}" if priority else queue


def _lists(broker: redis.Redis, keys: Keys) -> set[tuple[str, int, str]]:
    """The lists of our queues: queue, priority and key of each."""
    found = set()
    for page in _pages(broker, literal(keys.prefix) + "v*", kind="list"):
        for key in map(shown, page):
            queue, _, priority = key.removeprefix(keys.prefix).partition(_SEPARATOR)
            if _QUEUE.fullmatch(queue) and (priority or "0") in map(str, PRIORITIES):
                found.add((queue, int(priority or 0), key))
    return found


def _held(broker: redis.Redis, keys: Keys) -> Counter[str]:
    return Counter(message.queue for _, message in _unacked(broker, keys))


def _depths(
    broker: redis.Redis, keys: Keys, names: list[str], held: Counter[str]
) -> list[QueueDepth]:
    pipe = broker.pipeline(transaction=False)
    for queue in names:
        for priority in PRIORITIES:
            pipe.llen(keys.prefix + _list_name(queue, priority))
    lengths = iter(answers(pipe) if names else ())
    return [
        QueueDepth(queue, {priority: next(lengths) or 0 for priority in PRIORITIES}, held[queue])
        for queue in names
    ]


def _waiting(broker: redis.Redis, key: str, queue: str) -> Iterator[tuple[Any, Message]]:
    """What waits in a list, the newest first: what is taken meanwhile shifts nothing there."""
    now_s = seconds(broker.time())
    seen = set()
    with pass_over_wrong_type():
        for start in range(0, broker.llen(key), _PAGE):
            for raw in broker.lrange(key, start, start + _PAGE - 1):
                # What is sent meanwhile shows the end of a page again.
                if raw not in seen:
                    seen.add(raw)
                    yield raw, _message(json_object(raw), queue, "ready", now_s)


def _unacked(broker: redis.Redis, keys: Keys) -> Iterator[tuple[Any, Message]]:
    """What workers hold, by delivery tag, in no order."""
    pipe = broker.pipeline(transaction=False)
    pipe.time()
    pipe.zrange(keys.prefix + "unacked_index", 0, -1, withscores=True)
    now, index = answers(pipe)
    taken = dict(index or ())
    seen = set()
    with pass_over_wrong_type():
        for tag, raw in broker.hscan_iter(keys.prefix + "unacked", count=_PAGE):
            if tag in seen:
                continue
            seen.add(tag)
            entry = json_value(raw)
            is_known = isinstance(entry, list) and len(entry) == 3
            body, _, queue = entry if is_known else (None, "", "")
            message = _message(body, str(queue), "unacked", seconds(now))
            if tag in taken:
                age_s = max(0.0, seconds(now) - taken[tag])
                message = dataclasses.replace(message, age_s=age_s)
            yield tag, message


def _message(body: Any, queue: str, where: Literal["ready", "unacked"], now_s: float) -> Message:
    headers = body.get("headers") if isinstance(body, dict) else None
    headers = headers if isinstance(headers, dict) else {}
    task_id = str(headers.get("id", ""))
    match = _TASK_ID.fullmatch(task_id)
    run_id, batch_id, attempt = match.groups() if match else ("", "0", "0")
    age_s = _sent_ago_s(body, now_s)
    return Message(queue, task_id, run_id, int(batch_id), int(attempt), where, age_s)


def _sent_ago_s(body: Any, now_s: float) -> float | None:
    """A message says when it expires and how long that is after it was sent."""
    try:
        expires = datetime.fromisoformat(body["headers"]["expires"]).timestamp()
        return max(0.0, now_s - expires + float(body["properties"]["expiration"]) / 1000)
    except (LookupError, TypeError, ValueError):
        return None


def _remove(
    broker: redis.Redis, keys: Keys, choose: Callable[[set[str]], set[str]]
) -> dict[str, int]:
    """Remove the messages of the runs that ``choose`` picks among those that have some."""
    # In this order: what moves while we look moves from waiting to held.
    waiting = [
        (key, raw, message.run_id)
        for queue, _, key in _lists(broker, keys)
        for raw, message in _waiting(broker, key, queue)
    ]
    held = [(tag, m.run_id) for tag, m in _unacked(broker, keys) if _QUEUE.fullmatch(m.queue)]
    chosen = choose({run_id for *_, run_id in (*waiting, *held)} - {""})
    pipe = broker.pipeline(transaction=False)
    owners = []
    for key, raw, run_id in waiting:
        if run_id in chosen:
            pipe.lrem(key, 0, raw)
            owners.append(run_id)
    for tag, run_id in held:
        if run_id in chosen:
            pipe.hdel(keys.prefix + "unacked", tag)
            owners.append(run_id)
    removed = Counter(dict.fromkeys(owners, 0))
    for run_id, n in zip(owners, answers(pipe), strict=True):
        removed[run_id] += n or 0
    tags = [tag for tag, run_id in held if run_id in chosen]
    with pass_over_wrong_type():
        if tags:
            broker.zrem(keys.prefix + "unacked_index", *tags)
    return dict(removed)


def _pages(client: redis.Redis, pattern: str, kind: str | None = None) -> Iterator[list[Any]]:
    """Keys that match, in portions, so that a large database is never blocked."""
    cursor = 0
    while True:
        cursor, page = client.scan(cursor, match=pattern, count=_PAGE, _type=kind)
        if page:
            yield page
        if cursor == 0:
            return
