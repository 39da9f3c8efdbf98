"""The way to the Redis server: which one, how to ask it fast, and what its silence means.

Law: no call waits longer than its socket's timeout, nothing is retried in here, and every
error of the client library becomes one :class:`~toolkit.errors.ServerError` that says what is
wrong and how to mend it. A password is never shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from toolkit import config
from toolkit.cluster.state import read_state
from toolkit.config import Settings
from toolkit.errors import ServerError, SettingError

#: Seconds until a host that does not answer counts as out of reach.
CONNECT_TIMEOUT_S = 0.5

#: Seconds until a server that took a command and says nothing counts as frozen.
ANSWER_TIMEOUT_S = 1.0

#: Seconds in which a server shows that it speaks TLS, or that it does not.
_DIALECT_TIMEOUT_S = 0.3

#: What is said before an error's own words, by the way in which a server can fail.
_CURES = {
    "refused": "nothing listens there; start a server and workers with `toolkit cluster up`, or "
    "set REDIS_HOST and REDIS_PORT (or REDIS_URL) to one that runs",
    "unreachable": "its machine is off, or no way of the network leads there; look with `ping` and "
    "set REDIS_HOST or REDIS_URL if it is another one",
    "unknown-host": "there is no host of that name; set REDIS_HOST or REDIS_URL",
    "timeout": "it does not answer in time: the process is frozen or overloaded, or a firewall "
    "drops the packets; look at it with `redis-cli ping`, restart it if it hangs",
    "password": "it wants a password, another one, or a user with more rights; set REDIS_URL=redis://:PASSWORD@HOST:PORT",
    "tls": "one side speaks TLS and the other does not, or the certificate is not trusted; use "
    "rediss:// in REDIS_URL for a server with TLS (ssl_ca_certs=FILE names its authority) and "
    "redis:// for one without",
    "database": "it has no database of that number; set REDIS_BROKER_DB and REDIS_BACKEND_DB to "
    "0 (both may be the same), or raise `databases` in the server's configuration",
    "protected": "it is in protected mode and answers its own machine only; give it a password "
    "(`requirepass`) and name it in REDIS_URL, or bind it to an address that only your network "
    "reaches",
    "loading": "it is still reading its data from disk; wait a moment",
    "full": "its memory is full and it refuses to store more; raise `maxmemory`, or free some "
    "with `toolkit queue purge`",
    "read-only": "it is a replica, which takes no writes; name the primary in REDIS_URL",
    "clients": "it has too many connections; raise `maxclients`, or stop clients",
    "other": "it broke off or answered with an error; its log says more",
}

#: What the client library raises, by the way in which the server fails. The first that fits
#: counts: some are subclasses of those below them.
_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (redis.AuthenticationError, "password"),
    (redis.exceptions.NoPermissionError, "password"),
    (redis.exceptions.OutOfMemoryError, "full"),
    (redis.exceptions.ReadOnlyError, "read-only"),
    (redis.exceptions.MasterDownError, "loading"),
    (redis.BusyLoadingError, "loading"),
    (redis.InvalidResponse, "tls"),
    (ssl.SSLError, "tls"),
    (socket.gaierror, "unknown-host"),
    (ConnectionRefusedError, "refused"),
    (FileNotFoundError, "refused"),
    (redis.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
)

#: What the system says where Python has no class for it.
_NUMBERS = {errno.EHOSTUNREACH: "unreachable", errno.ENETUNREACH: "unreachable"}

#: The server's own words where the library has no class for them.
_WORDS = (
    ("DB index is out of range|invalid DB index", "database"),
    ("DENIED", "protected"),
    ("max number of clients", "clients"),
)

#: What an address may ask for besides its parts.
_OPTIONS = (
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_certfile",
    "ssl_keyfile",
    "username",
    "password",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where the server is.

    Attributes:
        url: Scheme, password, host and port, and options such as ``ssl_ca_certs``; no database.
        broker_db: Database of the queues.
        backend_db: Database of everything else.
        source: Which setting said so, in words.
    """

    url: str = dataclasses.field(repr=False)
    broker_db: int
    backend_db: int
    source: str

    @property
    def broker_url(self) -> str:
        """The database of the queues, as Celery writes it."""
        parts = urlsplit(self.url)
        if parts.scheme != "unix":
            return self.with_database(self.broker_db)
        query = urlencode([*parse_qsl(parts.query), ("virtual_host", self.broker_db)])
        return f"redis+socket://{parts.netloc}{parts.path}?{query}"

    @property
    def is_tls(self) -> bool:
        """Whether it is spoken to under TLS."""
        return self.url.startswith("rediss://")

    def with_database(self, number: int) -> str:
        """One database, as the client library writes it."""
        parts = urlsplit(self.url)
        query = parts.query
        if parts.scheme == "unix":
            query = urlencode([*parse_qsl(query), ("db", number)])
            return f"unix://{parts.netloc}{parts.path}?{query}"
        if self.is_tls and "ssl_cert_reqs" not in query:
            # Celery refuses an address that leaves this open.
            query = urlencode([*parse_qsl(query), ("ssl_cert_reqs", "required")])
        return urlunsplit(parts._replace(path=f"/{number}", query=query))

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return f"unix://{parts.path}"
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}:{parts.port or 6379}"


def resolve_address(settings: Settings) -> Address:
    """Which server: ``REDIS_URL``, else ``REDIS_HOST``, else this machine's own cluster.

    Raises:
        SettingError: If ``REDIS_URL`` is no address, or names another database than the two
            settings do.
    """
    databases = settings.redis_broker_db, settings.redis_backend_db
    if settings.redis_url:
        return Address(_checked(settings), *databases, _source(settings, "redis_url"))
    if all(_is_default(settings, name) for name in ("redis_host", "redis_port")):
        own = own_address(settings)
        if own:
            return own
    host = f"[{settings.redis_host}]" if ":" in settings.redis_host else settings.redis_host
    url = f"redis://{host}:{settings.redis_port}"
    return Address(url, *databases, _source(settings, "redis_host"))


def connect(address: Address, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> redis.Redis:
    """A client of the backend database that gives up fast and never retries by itself."""
    return _client(address.with_database(address.backend_db), answer_timeout_s)


def connect_broker(address: Address, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> redis.Redis:
    """The same for the database of the queues."""
    return _client(address.with_database(address.broker_db), answer_timeout_s)


@contextlib.contextmanager
def mapped_errors(address: Address) -> Iterator[None]:
    """Turn what the client libraries say into :class:`~toolkit.errors.ServerError`.

    Raises:
        ServerError: With the way in which the server failed.
    """
    try:
        yield
    except _library_errors() as error:
        cause = cause_of(error)
        # To a handshake a plain server is silent, for it waits for the end of the line, and a
        # server with TLS hangs up on a plain word: neither says what is wrong.
        if cause == ("timeout" if address.is_tls else "other") and _speaks_other_dialect(address):
            cause = "tls"
        words = " ".join(str(error).split())[:200]
        raise ServerError(str(address), cause, f"{_CURES[cause]} ({words})") from error


def cause_of(error: BaseException) -> str:
    """In which of the ways named by :class:`~toolkit.errors.ServerError` a server failed."""
    # The outermost that fits: what is further in may be an error that was dealt with before.
    for part in _chain(error):
        kinds = (cause for kind, cause in _KINDS if isinstance(part, kind))
        words = (cause for words, cause in _WORDS if re.search(words, str(part)))
        number = part.errno if isinstance(part, OSError) else None
        cause = next(kinds, None) or _NUMBERS.get(number or 0) or next(words, None)
        if cause:
            return cause
    return "other"


def _library_errors() -> tuple[type[Exception], ...]:
    # Not imported for its own sake: that takes 0.2 s, and who has not imported it cannot meet it.
    kombu = sys.modules.get("kombu.exceptions")
    return (redis.RedisError, OSError, *([kombu.OperationalError] if kombu else []))


def _speaks_other_dialect(address: Address) -> bool:
    """Whether the server speaks TLS where it was not expected, or the other way about."""
    parts = urlsplit(address.url)
    if parts.scheme == "unix":
        return False
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    where = parts.hostname or "localhost", parts.port or 6379
    try:
        with socket.create_connection(where, timeout=_DIALECT_TIMEOUT_S) as plain:
            if not address.is_tls:
                with context.wrap_socket(plain):
                    return True
            plain.sendall(b"PING\r\n")
            return plain.recv(1) in (b"+", b"-")
    except OSError:
        return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _client(url: str, answer_timeout_s: float) -> redis.Redis:
    # The library's own default is ten retries: a frozen server would be noticed after 10 s.
    tcp_alone: dict[str, Any] = {} if url.startswith("unix") else {"socket_keepalive": True}
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=answer_timeout_s,
        **tcp_alone,
        # A batch of pictures is 8 MiB: by pieces of 64 KiB it takes half as long again.
        socket_read_size=1 << 20,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
    )


def _checked(settings: Settings) -> str:
    """``REDIS_URL`` without its database, which must be one of the two settings'."""
    url, source = str(settings.redis_url), _source(settings, "redis_url")
    parts, options = _parsed(url, source)
    named = options.pop("db", None) or (parts.path.strip("/") if parts.scheme != "unix" else "")
    if named and named not in (str(settings.redis_broker_db), str(settings.redis_backend_db)):
        raise _refusal(
            url,
            f"an address without a database: REDIS_BROKER_DB={settings.redis_broker_db} and "
            f"REDIS_BACKEND_DB={settings.redis_backend_db} say which, and neither is {named!r}",
            source,
        )
    if parts.scheme == "unix":
        return f"unix://{parts.netloc}{parts.path}?{urlencode(options)}"
    return urlunsplit(parts._replace(path="", query=urlencode(options)))


def _parsed(url: str, source: str) -> tuple[SplitResult, dict[str, str]]:
    """The parts and the options of an address, each one understood."""
    try:
        parts = urlsplit(url)
        is_address = parts.port != 0 and _is_address(parts)
    except ValueError:  # a port that is no number, half a bracket
        is_address = False
    if not is_address:
        raise _refusal(
            url,
            "an address such as redis://:PASSWORD@HOST:6379, or rediss:// for TLS; "
            "/ ? # and @ in a password are written %2F %3F %23 and %40",
            source,
        )
    options = dict(parse_qsl(parts.query))
    for name, value in options.items():
        if name not in ("db", *_OPTIONS):
            raise _refusal(url, f"no option {name}; there are: {', '.join(_OPTIONS)}", source)
        if name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") and not Path(value).is_file():
            raise _refusal(url, f"a file that is there for {name}", source)
    return parts, options


def _is_address(parts: SplitResult) -> bool:
    if parts.fragment or "@" in parts.path + parts.query:  # a password that was not escaped
        return False
    if parts.scheme == "unix":
        return bool(parts.path)
    return parts.scheme in ("redis", "rediss") and bool(parts.hostname)


def _refusal(url: str, allowed: str, source: str) -> SettingError:
    # Without a scheme, the setting's own mask finds no password.
    shown = config.masked(url) if "://" in url else re.sub(".*@", "***@", url)
    return SettingError("REDIS_URL", shown, allowed, source)


def own_address(settings: Settings) -> Address | None:
    """Address of this machine's own server while its process lives."""
    state = read_state(settings.data_dir)
    if state is None or not state.server.process.is_alive:
        return None
    databases = settings.redis_broker_db, settings.redis_backend_db
    return Address(state.server.url, *databases, "the cluster of this machine")


def _is_default(settings: Settings, name: str) -> bool:
    return settings.sources.get(name, "default") == "default"


def _source(settings: Settings, name: str) -> str:
    source = settings.sources.get(name, "default")
    return f"{name.upper()} ({source})"
