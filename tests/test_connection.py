"""The ways in which a server can fail, made for real and told apart."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu.connection import Connection

from tests.servers import Certificates, Relay, Server, black_hole, free_port, mute_port
from toolkit import config
from toolkit.cluster.connection import (
    Address,
    connect,
    connect_broker,
    mapped_errors,
    resolve_address,
)
from toolkit.errors import ServerError, SettingError

#: Seconds within which any failure of a server must be known.
SOON_S = 1.5

#: A password that no message may show, with what an address must escape.
SECRET = "hush/hu@sh#1"


def address(**settings: object) -> Address:
    """The address that settings lead to."""
    return resolve_address(config.resolve(**settings))


def ask(where: Address, question: Callable[[redis.Redis], Any] = redis.Redis.ping) -> Any:
    """Put a question the way the house does."""
    with mapped_errors(where), connect(where) as client:
        return question(client)


def failure(
    where: Address, question: Callable[[redis.Redis], Any] = redis.Redis.ping
) -> ServerError:
    """How a server fails, found out in time."""
    begun = time.monotonic()
    with pytest.raises(ServerError) as caught:
        ask(where, question)
    assert time.monotonic() - begun < SOON_S
    return caught.value


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """An open server that no test breaks."""
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """One with a password that no test breaks."""
    with Server(password=SECRET) as running:
        yield running


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority that nobody trusts unless it is named."""
    return Certificates.make(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def encrypted(certificates: Certificates) -> Iterator[Server]:
    """One behind TLS, with a password."""
    with Server(certificates=certificates, password=SECRET) as running:
        yield running


def test_server_that_runs_answers(server: Server) -> None:
    where = address(redis_host="127.0.0.1", redis_port=server.port)

    assert ask(where) is True
    assert str(where) == f"redis://127.0.0.1:{server.port}"


def test_the_two_databases_are_two(server: Server) -> None:
    where = address(redis_url=server.url, redis_broker_db=3, redis_backend_db=4)

    with connect(where) as backend, connect_broker(where) as broker:
        backend.set("side", "backend")
        broker.set("side", "broker")

    with server.client(3) as third, server.client(4) as fourth:
        assert (third.get("side"), fourth.get("side")) == (b"broker", b"backend")


def test_nothing_listens() -> None:
    error = failure(address(redis_host="127.0.0.1", redis_port=free_port()))

    assert error.cause == "refused"
    assert "toolkit cluster up" in str(error)


def test_no_host_of_that_name() -> None:
    error = failure(address(redis_host="no-such-host.invalid"))

    assert error.cause == "unknown-host"
    assert "REDIS_HOST" in str(error)


@pytest.mark.slow
def test_frozen_server() -> None:
    with Server() as frozen:
        frozen.freeze()

        error = failure(address(redis_url=frozen.url))

        frozen.thaw()
        assert error.cause == "timeout"
        assert ask(address(redis_url=frozen.url)) is True


def test_packets_that_vanish() -> None:
    with black_hole() as port:
        assert failure(address(redis_host="127.0.0.1", redis_port=port)).cause == "timeout"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_port_that_never_says_a_word(scheme: str) -> None:
    with mute_port() as port:
        assert failure(address(redis_url=f"{scheme}://127.0.0.1:{port}")).cause == "timeout"


def test_half_open_connection_is_given_up(server: Server) -> None:
    with Relay(server.port) as relay:
        where = address(redis_host="127.0.0.1", redis_port=relay.port)
        with connect(where, answer_timeout_s=0.2) as client:
            client.ping()
            relay.swallow()

            with pytest.raises(ServerError) as caught, mapped_errors(where):
                client.ping()
            revived = client.ping()

    assert caught.value.cause == "timeout"
    assert revived is True


def test_password_is_believed(guarded: Server) -> None:
    assert ask(address(redis_url=guarded.url)) is True


@pytest.mark.parametrize("account", ["", ":wrong%2Fsecret@", "bob:wrong%2Fsecret@"])
def test_password_missing_or_wrong(guarded: Server, account: str) -> None:
    error = failure(address(redis_url=f"redis://{account}127.0.0.1:{guarded.port}"))

    assert error.cause == "password"
    assert "REDIS_URL=redis://:PASSWORD@" in str(error)


def test_password_that_an_open_server_does_not_ask_for(server: Server) -> None:
    # It lets everybody in, so the password is no reason to stay out.
    assert ask(address(redis_url=f"redis://:needless@127.0.0.1:{server.port}")) is True


def test_user_without_the_right_to_write(server: Server) -> None:
    with server.client() as root:
        root.acl_setuser("reader", enabled=True, passwords=["+look"], categories=["+@read"])
        where = address(redis_url=f"redis://reader:look@127.0.0.1:{server.port}")

        error = failure(where, lambda client: client.set("a", "b"))

    assert error.cause == "password"
    assert "more rights" in str(error)


def test_encrypted_server_answers(encrypted: Server) -> None:
    assert ask(address(redis_url=encrypted.url)) is True


@pytest.mark.slow
def test_encryption_that_a_plain_server_does_not_speak(server: Server) -> None:
    error = failure(address(redis_url=f"rediss://127.0.0.1:{server.port}"))

    # It says nothing to a handshake; frozen it is not.
    assert error.cause == "tls"


def test_plain_words_to_an_encrypted_server(encrypted: Server) -> None:
    error = failure(address(redis_url=f"redis://:pw@127.0.0.1:{encrypted.port}"))

    assert error.cause == "tls"
    assert "rediss://" in str(error)


def test_certificate_of_an_unknown_authority(encrypted: Server, tmp_path: Path) -> None:
    other = Certificates.make(tmp_path / "theirs")
    url = f"rediss://127.0.0.1:{encrypted.port}"

    causes = [
        failure(address(redis_url=url)).cause,
        failure(address(redis_url=f"{url}?ssl_ca_certs={other.authority}")).cause,
    ]

    assert causes == ["tls", "tls"]


def test_database_that_the_server_does_not_have(server: Server) -> None:
    error = failure(address(redis_url=server.url, redis_backend_db=99))

    assert error.cause == "database"
    assert "REDIS_BACKEND_DB" in str(error)


def test_protected_mode() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: the system names our own address
        except OSError:
            pytest.skip("this machine has no address but its loopback")
        own = probe.getsockname()[0]
    with Server(bind=own, protected_mode="yes") as server:
        error = failure(address(redis_host=own, redis_port=server.port))

    assert error.cause == "protected"
    assert "requirepass" in str(error)


def test_full_server_refuses_a_write() -> None:
    with Server(maxmemory="1mb") as full:
        error = failure(address(redis_url=full.url), lambda client: client.set("a", "b"))

    assert error.cause == "full"
    assert "maxmemory" in str(error)


def test_full_server_refuses_a_pipeline() -> None:
    with Server(maxmemory="1mb") as full:
        error = failure(
            address(redis_url=full.url),
            lambda client: client.pipeline().get("a").set("a", "b").execute(),
        )

    assert error.cause == "full"


def test_replica_takes_no_writes(server: Server) -> None:
    with Server(replicaof=f"127.0.0.1 {server.port}") as replica:
        error = failure(address(redis_url=replica.url), lambda client: client.set("a", "b"))

    assert error.cause == "read-only"


def test_too_many_connections() -> None:
    with Server(maxclients="1") as server, server.client() as first:
        first.ping()

        error = failure(address(redis_url=server.url))

    assert error.cause == "clients"


def test_client_outlives_a_restart_of_its_server() -> None:
    with Server() as server:
        where = address(redis_url=server.url)
        with connect(where) as client, mapped_errors(where):
            client.ping()
            server.restart()

            assert client.ping() is True


@pytest.mark.slow
def test_server_that_went_away_for_good_as_celery_sees_it() -> None:
    where = address(redis_host="127.0.0.1", redis_port=free_port())

    with pytest.raises(ServerError) as caught, mapped_errors(where):
        with Connection(where.broker_url) as connection:
            connection.ensure_connection(max_retries=1, timeout=1, reraise_as_library_errors=True)

    assert caught.value.cause == "refused"


def test_unix_socket(server: Server) -> None:
    where = address(redis_url=f"unix://{server.folder}/socket", redis_broker_db=5)

    assert str(where) == f"unix://{server.folder}/socket"
    assert ask(where) is True
    with Connection(where.broker_url) as celery:
        celery.default_channel.client.set("who", "celery")
    with connect_broker(where) as broker:
        assert broker.get("who") == b"celery"


def test_unix_socket_that_is_not_there(tmp_path: Path) -> None:
    assert failure(address(redis_url=f"unix://{tmp_path}/socket")).cause == "refused"


def test_ipv6_host() -> None:
    with Server(bind="::1") as server:
        by_host = address(redis_host="::1", redis_port=server.port)
        by_url = address(redis_url=server.url)

        assert (ask(by_host), ask(by_url)) == (True, True)
        assert str(by_host) == str(by_url) == f"redis://[::1]:{server.port}"


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        (f"redis://:{SECRET}@host:6379", "%2F"),
        ("redis://bob:12/hush@host:6379", "%2F"),
        ("redis://:hush@host:6379/7", "REDIS_BROKER_DB=0 and REDIS_BACKEND_DB=1"),
        ("redis://:hush@host:6379?db=7", "REDIS_BROKER_DB=0 and REDIS_BACKEND_DB=1"),
        ("redis://:hush@host:port", "redis://:PASSWORD@HOST:6379"),
        ("redis://:hush@[host", "redis://:PASSWORD@HOST:6379"),
        ("http://:hush@host:6379", "redis://:PASSWORD@HOST:6379"),
        (":hush@host:6379", "redis://:PASSWORD@HOST:6379"),
        ("redis://", "redis://:PASSWORD@HOST:6379"),
        ("redis://:hush@host?timeout=3", "ssl_ca_certs"),
        ("rediss://:hush@host?ssl_ca_certs=/no/such/file", "a file that is there"),
    ],
)
def test_address_that_cannot_be_is_refused_with_the_cure(url: str, cure: str) -> None:
    with pytest.raises(SettingError) as caught:
        address(redis_url=url)

    assert cure in str(caught.value)
    assert not re.search("hush|sh#1", str(caught.value))


@pytest.mark.parametrize("database", ["/0", "/1", "?db=1", ""])
def test_address_may_name_one_of_the_two_databases(server: Server, database: str) -> None:
    assert ask(address(redis_url=server.url + database)) is True


def test_password_is_never_shown(guarded: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    right = address(redis_url=guarded.url)
    wrong = address(redis_url=guarded.url.replace("%40", "%41"))

    error = failure(wrong)
    logging.getLogger(__name__).warning("%s %r", error, error, exc_info=error)

    for text in (str(right), repr(right), str(error), repr(error), caplog.text):
        assert not re.search("hush|hu%4|sh#1|sh%23", text)
