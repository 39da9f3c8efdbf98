"""Who is registered: what workers say of themselves, and how others read it.

Law: ages come from the server (its TTLs and its clock), never from the clock of a host that
writes or reads; and what a worker of another release wrote is read as far as it is understood,
never an error.

Functions here raise what the client library raises; callers wrap them in
:func:`toolkit.cluster.connection.mapped_errors`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import struct
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import redis
from numpy.typing import NDArray

from toolkit.cluster.protocol import Keys
from toolkit.cluster.reading import answers, json_object, seconds, shown

#: Seconds for which a worker that died is still listed.
REMEMBER_S = 600

#: Seconds after the last beat of any worker until the list of workers is gone.
WORKERS_TTL_S = 3600

#: Ends the field of the list that holds what a worker's embedding process said last.
_WORK = ":work"


class WorkerState(enum.StrEnum):
    """What a worker does.

    ``starting``: it has not been ready yet. ``refused``: it will not become ready and says why.
    ``stale``: it lives, and its process that embeds has fallen silent. ``dead``: it is silent.
    """

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    REFUSED = "refused"
    STALE = "stale"
    DEAD = "dead"


@dataclasses.dataclass(frozen=True, slots=True)
class _Said:
    """Something that crosses the server as JSON, perhaps between two releases."""

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read back :meth:`to_json`: fields that are not understood keep their default."""
        default = cls()
        names = [field.name for field in dataclasses.fields(default)]
        return cls(**{n: _as_kind(value.get(n), getattr(default, n)) for n in names})


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerInfo(_Said):
    """What a worker's main process says of itself with each beat.

    Attributes:
        id: Unique among all workers that ever were.
        pid: Its main process.
        host: Its machine.
        version: Release of this package.
        protocol: See :data:`~toolkit.cluster.protocol.PROTOCOL`.
        pool: ``prefork``, ``solo`` or ``threads``.
        queues: What it consumes, without the namespace.
        encoders: What it serves: fingerprint → timm name.
        visibility_timeout_s: See :attr:`toolkit.config.Settings.visibility_timeout_s`.
        supervised: Whether something starts it again when it dies.
        roots: Folders under which it reads files by their path.
        beat_s: Seconds between two beats.
        ttl_s: Seconds after its last beat for which it counts as alive.
        started_s: Seconds since it started, by its own clock.
        reason: What it waits for while it is not ready.
        ended: How its process ended, where a supervisor saw that.
    """

    id: str = ""
    pid: int = 0
    host: str = ""
    version: str = ""
    protocol: int = 0
    pool: str = ""
    queues: tuple[str, ...] = ()
    encoders: dict[str, str] = dataclasses.field(default_factory=dict)
    visibility_timeout_s: float = 0.0
    supervised: bool = False
    roots: tuple[str, ...] = ()
    beat_s: float = 0.0
    ttl_s: float = 0.0
    started_s: float = 0.0
    reason: str | None = None
    ended: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class WorkInfo(_Said):
    """What the process of a worker that embeds says with each beat.

    Attributes:
        pid: The process.
        state: ``starting``, ``ready``, ``busy`` or ``refused``.
        reason: Why it is not ready.
        device: Where it computes.
        run: Run of the batch in hand, or empty.
        batch: The batch in hand.
        done: Its items that are done.
        busy_s: Seconds since it took the batch.
        progress_s: Seconds since an item was begun or done.
        images: Embedded since the start.
        rate: Images per second over the last batches.
        formats: Name of each format it decodes → digest of the golden picture's pixels.
        golden: Fingerprints for which its vectors of the golden pictures can be read.
        encoders: Fingerprints it has loaded.
    """

    pid: int = 0
    state: WorkerState = WorkerState.STARTING
    reason: str | None = None
    device: str = ""
    run: str = ""
    batch: int = 0
    done: int = 0
    busy_s: float = 0.0
    progress_s: float = 0.0
    images: int = 0
    rate: float = 0.0
    formats: dict[str, str] = dataclasses.field(default_factory=dict)
    golden: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as it looks from outside.

    Attributes:
        id: Its name in the registry.
        info: What its main process said last.
        work: What its embedding process said last, ``None`` when it never spoke.
        is_alive: Whether the main process beats.
        is_working: Whether the embedding process beats.
        beat_age_s: Seconds since the last beat of the main process.
    """

    id: str
    info: WorkerInfo
    work: WorkInfo | None
    is_alive: bool
    is_working: bool
    beat_age_s: float

    @property
    def state(self) -> WorkerState:
        """What it does."""
        if not self.is_alive:
            return WorkerState.DEAD
        if self.work is None:
            # One that consumes was ready: the server was emptied between its two beats.
            consumes = self.info.queues and not self.info.reason
            return WorkerState.READY if consumes else WorkerState.STARTING
        if self.work.state is WorkerState.READY and not self.info.queues:
            # Loaded, and not consuming yet, or not any more.
            return WorkerState.STARTING
        return self.work.state if self.is_working else WorkerState.STALE

    @property
    def reason(self) -> str | None:
        """Why it is not ready, in its own words."""
        return (self.work and self.work.reason) or self.info.reason

    @property
    def pid(self) -> int:
        """Its main process."""
        return self.info.pid

    @property
    def host(self) -> str:
        """Its machine."""
        return self.info.host

    @property
    def device(self) -> str:
        """Where it computes, empty while that is not known."""
        return self.work.device if self.work else ""

    def __str__(self) -> str:
        return f"worker {self.id} (pid {self.pid} on {self.host})"


def announce(client: redis.Redis, keys: Keys, info: WorkerInfo) -> None:
    """One beat of a worker's main process."""
    text = json.dumps({**info.to_json(), "last_seen": seconds(client.time())})
    pipe = client.pipeline()
    pipe.hset(keys.workers, info.id, text)
    pipe.expire(keys.workers, WORKERS_TTL_S)
    pipe.set(keys.worker(info.id), text, px=_ms(info.ttl_s))
    pipe.execute()


def announce_work(
    client: redis.Redis, keys: Keys, worker_id: str, work: WorkInfo, ttl_s: float
) -> None:
    """One beat of a worker's embedding process."""
    text = json.dumps(work.to_json())
    pipe = client.pipeline()
    # Kept beyond the key, so that a process that fell silent is told from one that never spoke.
    pipe.hset(keys.workers, worker_id + _WORK, text)
    pipe.set(keys.work(worker_id), text, px=_ms(ttl_s))
    pipe.execute()


def withdraw(client: redis.Redis, keys: Keys, worker_id: str) -> None:
    """Remove everything of a worker that ended; no other worker's is touched."""
    _take_out(client, keys, worker_id, None)


def bury(client: redis.Redis, keys: Keys, worker_id: str, ended: str) -> None:
    """Let a worker count as dead at once, and be listed with how it ended for a while."""
    _take_out(client, keys, worker_id, ended)


def _take_out(client: redis.Redis, keys: Keys, worker_id: str, ended: str | None) -> None:
    work = WorkInfo.from_json(json_object(client.hget(keys.workers, worker_id + _WORK)) or {})
    entry = json_object(client.hget(keys.workers, worker_id))
    pipe = client.pipeline()
    pipe.hdel(keys.workers, worker_id, worker_id + _WORK)
    if ended and entry:
        last = {**entry, "last_seen": seconds(client.time()), "ended": ended}
        pipe.hset(keys.workers, worker_id, json.dumps(last))
    pipe.delete(keys.worker(worker_id), keys.work(worker_id))
    for fingerprint in work.golden:
        pipe.delete(keys.golden(worker_id, fingerprint))
    pipe.execute()


def publish_golden(
    client: redis.Redis,
    keys: Keys,
    worker_id: str,
    fingerprint: str,
    vectors: NDArray[np.float32],
    ttl_s: float,
) -> None:
    """Let others read a worker's vectors of the golden pictures, shape ``(n, dim)``."""
    blob = struct.pack("<II", *vectors.shape) + np.ascontiguousarray(vectors, "<f4").tobytes()
    client.set(keys.golden(worker_id, fingerprint), blob, px=_ms(ttl_s))


def renew_golden(
    client: redis.Redis, keys: Keys, worker_id: str, fingerprints: Iterable[str], ttl_s: float
) -> list[str]:
    """Keep golden vectors for longer.

    Returns:
        The fingerprints whose vectors are gone and have to be published again.
    """
    asked = list(fingerprints)
    pipe = client.pipeline(transaction=False)
    for fingerprint in asked:
        pipe.pexpire(keys.golden(worker_id, fingerprint), _ms(ttl_s))
    return [name for name, is_there in zip(asked, pipe.execute(), strict=True) if not is_there]


def read_golden(
    client: redis.Redis, keys: Keys, worker_id: str, fingerprint: str
) -> NDArray[np.float32] | None:
    """A worker's vectors of the golden pictures; ``None`` if it has none that can be read."""
    pipe = client.pipeline(transaction=False)
    pipe.get(keys.golden(worker_id, fingerprint))
    (blob,) = answers(pipe)
    if blob is None or len(blob) < 8:
        return None
    n, dim = struct.unpack_from("<II", blob)
    if len(blob) != 8 + n * dim * 4:
        return None
    return np.frombuffer(blob, "<f4", offset=8).reshape(n, dim).astype(np.float32)


def list_workers(client: redis.Redis, keys: Keys, *, dead: bool = False) -> list[WorkerView]:
    """The workers that are registered, sorted by id, in two round trips.

    Entries that cannot be understood are passed over. What has been silent for more than
    :data:`REMEMBER_S` seconds is removed.

    Args:
        client: Of the backend database.
        keys: The namespace.
        dead: Whether to list those too that fell silent.
    """
    pipe = client.pipeline(transaction=False)
    pipe.time()
    pipe.hgetall(keys.workers)
    now, said = answers(pipe)
    entries = {shown(field): json_object(value) for field, value in (said or {}).items()}
    mains = {name: entry for name, entry in entries.items() if entry and not name.endswith(_WORK)}
    now_s = seconds(now)
    silent = {name: now_s - _as_kind(e.get("last_seen"), now_s) for name, e in mains.items()}
    pipe = client.pipeline(transaction=False)
    for name in mains:
        pipe.pttl(keys.worker(name))
        pipe.exists(keys.work(name))
    for name in entries:
        owner = name.removesuffix(_WORK)
        if silent.get(owner, 0) > REMEMBER_S or (owner != name and owner not in entries):
            pipe.hdel(keys.workers, name)
    signs = answers(pipe)
    views = [
        _view(name, entry, entries.get(name + _WORK), signs[2 * n], signs[2 * n + 1], silent[name])
        for n, (name, entry) in enumerate(mains.items())
    ]
    kept = (v for v in views if v.is_alive or (dead and v.beat_age_s <= REMEMBER_S))
    return sorted(kept, key=lambda view: view.id)


def _view(
    name: str,
    entry: dict[str, Any],
    work: dict[str, Any] | None,
    left_ms: int,
    is_working: int,
    silent_s: float,
) -> WorkerView:
    info = dataclasses.replace(WorkerInfo.from_json(entry), id=name)
    is_alive = left_ms > 0
    age_s = info.ttl_s - left_ms / 1000 if is_alive else silent_s
    said = None if work is None else WorkInfo.from_json(work)
    return WorkerView(name, info, said, is_alive, bool(is_working), max(0.0, age_s))


def _as_kind(item: Any, fallback: Any) -> Any:
    """``item`` if it is of the kind of ``fallback``, else ``fallback``."""
    if isinstance(fallback, WorkerState):
        return WorkerState(item) if item in list(WorkerState) else fallback
    if isinstance(fallback, tuple):
        parts = item if isinstance(item, list) else []
        return tuple(part for part in parts if isinstance(part, str))
    if isinstance(fallback, dict):
        rows = item.items() if isinstance(item, dict) else ()
        return {name: text for name, text in rows if isinstance(text, str)}
    if isinstance(fallback, float):
        is_number = type(item) is float or (type(item) is int and abs(item) < 1 << 53)
        return float(item) if is_number and math.isfinite(item) else fallback
    return item if type(item) is (str if fallback is None else type(fallback)) else fallback


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
