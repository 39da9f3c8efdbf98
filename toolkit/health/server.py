"""The server: whether it answers, whether it is safe to use, and what its queues hold."""

from __future__ import annotations

import dataclasses
import ipaddress
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from toolkit.cluster import queues
from toolkit.cluster.connection import (
    Address,
    connect,
    connect_broker,
    mapped_errors,
    own_address,
)
from toolkit.cluster.reading import seconds
from toolkit.errors import ServerError
from toolkit.health.case import Case, encoder_flags, variables
from toolkit.health.report import Check, Status

if TYPE_CHECKING:
    import redis

#: Share of its memory above which a server is called nearly full.
FULL_SHARE = 0.9

#: Memory that is proposed where a server has no limit: ten times what a window takes.
_PROPOSED_MEMORY = "256mb"

#: Seconds by which clocks may differ before anybody is told: messages expire after a day.
_SKEW_S = 3600.0


def check_settings(case: Case) -> Check:
    """Where the server is, and who says so."""
    address, settings = case.address, case.settings
    detail = f"{address} from {address.source}, namespace {settings.namespace}"
    if not settings.distributed_available:
        source = settings.sources.get("distributed_available", "default")
        off = f"the workers are switched off (DISTRIBUTED_AVAILABLE=false from {source}); {detail}"
        return Check("settings", Status.WARN, off, variables(DISTRIBUTED_AVAILABLE="true"))
    own = own_address(settings)
    if own is not None and own.url != address.url:
        passed = f"{detail}; the cluster of this machine at {own} is passed by"
        return Check("settings", Status.WARN, passed, "unset REDIS_URL REDIS_HOST REDIS_PORT")
    return Check("settings", Status.OK, detail)


def reach(case: Case) -> tuple[Check, Check]:
    """Whether the server answers, and whether it has both databases."""
    address = case.address
    try:
        with mapped_errors(address), connect(address) as backend:
            backend.ping()  # connecting and its handshake are not what is measured
            begun = time.perf_counter()
            backend.ping()
            took_ms = round((time.perf_counter() - begun) * 1000, 2)
        with mapped_errors(address), connect_broker(address) as broker:
            broker.ping()
    except ServerError as error:
        failed = not_reached(case, error)
        if error.cause != "database":
            return failed, Check("databases", Status.SKIP, "the server cannot be used")
        answers = Check("redis", Status.OK, f"{address} answers")
        return answers, dataclasses.replace(failed, name="databases")
    detail = f"queues in {address.broker_db}, everything else in {address.backend_db}"
    return (
        Check("redis", Status.OK, f"{address} answers", latency_ms=took_ms),
        Check("databases", Status.OK, detail),
    )


def not_reached(case: Case, error: ServerError) -> Check:
    """The check of a server that cannot be used, with what mends it."""
    what = error.reason.partition("; ")[0]
    words = " ".join(str(error.__cause__ or "").split())[:200]
    # A library's words may repeat an address as it was given.
    hidden = urlsplit(case.address.url).password
    shown = words.replace(hidden, "***") if hidden else words
    detail = f"{error.address}: {what}" + (f" ({shown})" if shown else "")
    return Check("redis", Status.FAIL, detail, _cure(case, error.cause, shown))


def check_memory(case: Case, backend: redis.Redis) -> Check:
    """Whether the server refuses what it cannot keep, rather than to drop it, and has room."""
    found = _asked(case, lambda: backend.info("memory"))
    if found is None:
        return Check("memory", Status.SKIP, "this user may not ask (INFO)")
    used, most = int(found["used_memory"]), int(found.get("maxmemory", 0))
    policy = str(found.get("maxmemory_policy", "noeviction"))
    cli = queues.redis_cli(case.address, asks=True)
    detail = f"{used / 1e6:.1f} MB used of {f'{most / 1e6:.0f} MB' if most else 'no limit'}"
    if policy != "noeviction":
        evicts = f"policy {policy} drops batches when memory is full; {detail}"
        cure = f"{cli} CONFIG SET maxmemory-policy noeviction"
        return Check("memory", Status.WARN, evicts, cure)
    if not most:
        cure = f"{cli} CONFIG SET maxmemory {_PROPOSED_MEMORY}"
        return Check("memory", Status.WARN, f"{detail}: it may take the whole machine's", cure)
    if used > FULL_SHARE * most:
        return Check("memory", Status.WARN, f"nearly full: {detail}", "toolkit queue purge")
    return Check("memory", Status.OK, f"{detail}, {policy}")


def check_exposure(case: Case, backend: redis.Redis) -> Check:
    """Whether others than those who are meant to can use the server."""
    parts = urlsplit(case.address.url)
    if parts.scheme == "unix":
        return Check("exposure", Status.OK, "reached through a socket of this machine")
    if parts.password:
        return Check("exposure", Status.OK, "it asks for a password")
    found = _asked(case, lambda: backend.config_get("bind", "protected-mode")) or {}
    bind = str(found.get("bind", parts.hostname))
    is_closed = found.get("protected-mode") == "yes" or all(map(_is_loopback, bind.split()))
    if bind.split() and is_closed and _is_loopback(str(parts.hostname)):
        return Check("exposure", Status.OK, "no password, for this machine alone")
    host, port = parts.hostname, parts.port or 6379
    cure = (
        f"{queues.redis_cli(case.address, asks=True)} CONFIG SET requirepass PASSWORD; "
        + variables(REDIS_URL=f"{parts.scheme}://:PASSWORD@{host}:{port}")
    )
    detail = f"no password, and it listens on {bind.strip() or 'every address'}: whoever reaches "
    return Check("exposure", Status.WARN, f"{detail}port {port} can read and delete it", cure)


def check_clock(backend: redis.Redis) -> Check:
    """How far the server's clock is from this machine's; nothing is decided by it."""
    begun = time.time()
    theirs_s = seconds(backend.time())
    skew_s = theirs_s - (begun + time.time()) / 2
    detail = f"the server is {abs(skew_s):.1f} s {'ahead' if skew_s > 0 else 'behind'}"
    if abs(skew_s) > _SKEW_S:
        return Check("clock", Status.WARN, detail, "timedatectl set-ntp true")
    return Check("clock", Status.OK, f"{detail}; nothing is decided by it")


def check_queue(case: Case, broker: redis.Redis, backend: redis.Redis) -> Check:
    """What waits in each list of each queue, what workers hold, and whose it is."""
    depths = queues.queues(broker, case.keys)
    waiting = list(queues.messages(broker, case.keys))
    if not depths and not waiting:
        return Check("queue", Status.OK, "nothing waits, and workers hold nothing")
    detail = "; ".join(map(_depth, depths))
    ages = [message.age_s for message in waiting if message.age_s is not None]
    if ages:
        detail += f"; the oldest for {max(ages):.0f} s"
    runs = {message.run_id for message in waiting if message.run_id}
    dead = [run for run in sorted(runs) if not backend.exists(case.keys.run(run))]
    if dead:
        detail += f"; the client of {', '.join(dead[:3])} is gone"
        return Check("queue", Status.WARN, detail, "toolkit queue purge")
    return Check("queue", Status.OK, detail)


def _depth(depth: queues.QueueDepth) -> str:
    lists = ", ".join(f"priority {p}: {n}" for p, n in depth.by_priority.items() if n)
    waits = f"{depth.ready} wait ({lists})" if lists else "none waits"
    return f"{depth.queue}: {waits}, workers hold {depth.unacked}"


def _asked(case: Case, question: Any) -> Any:
    """The answer; ``None`` where the server does not let this user ask."""
    try:
        with mapped_errors(case.address):
            return question()
    except ServerError as error:
        if error.cause not in ("password", "other"):
            raise
        return None


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name.lstrip("-")).is_loopback
    except ValueError:
        return name == "localhost"


def _cure(case: Case, cause: str, words: str) -> str:
    """The command that mends a server that fails in one of its ways."""
    address, parts = case.address, urlsplit(case.address.url)
    where = f"{parts.hostname}:{parts.port or 6379}"
    cli = queues.redis_cli(address, asks=True)
    cures = {
        "refused": _own_cluster(case),
        "unknown-host": variables(REDIS_HOST="HOST"),
        "unreachable": f"ping {parts.hostname}",
        "timeout": f"{cli} ping",
        "password": variables(REDIS_URL=f"{parts.scheme}://:PASSWORD@{where}"),
        "tls": variables(REDIS_URL=_other_dialect(address, where, words)),
        "database": variables(REDIS_BROKER_DB=0, REDIS_BACKEND_DB=0),
        "protected": variables(REDIS_URL=f"{parts.scheme}://:PASSWORD@{where}"),
        "loading": "toolkit doctor --watch",
        "full": "toolkit queue purge",
        "read-only": f"{cli} INFO replication",
        "clients": f"{cli} CONFIG SET maxclients 10000",
    }
    return cures.get(cause, f"{cli} ping")


def _own_cluster(case: Case) -> str:
    """Start a server here, and let it be the one that is used."""
    sources = case.settings.sources
    names = [name for name in ("redis_url", "redis_host", "redis_port")
             if sources.get(name, "default") != "default"]  # fmt: skip
    unset = f"unset {' '.join(name.upper() for name in names)}; " if names else ""
    return f"{unset}toolkit cluster up {encoder_flags(case.request)}"


def _other_dialect(address: Address, where: str, words: str) -> str:
    account = ":PASSWORD@" if urlsplit(address.url).password else ""
    if address.is_tls and "certificate" not in words.lower():
        return f"redis://{account}{where}"
    return f"rediss://{account}{where}?ssl_ca_certs=FILE"
