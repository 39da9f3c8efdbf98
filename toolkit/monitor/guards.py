"""Who may ask the monitor for what; what a web page could do behind its visitor's back.

Law: any page that a user visits can send requests to this machine. What changes something must
be JSON, which a foreign page cannot send unasked, and come from our own page or from none; a
name that is not ours in ``Host`` is a foreign page that had its name lead here. Where others
reach the monitor, nothing is changed without a token.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, HTTPConnection, Request

from toolkit import config
from toolkit.cluster.reading import json_value

#: Bytes that a body may have.
MOST_BYTES = 64 << 10

#: Seconds that a body may take to come.
BODY_S = 10.0

#: Methods that change nothing.
_READING = ("GET", "HEAD", "OPTIONS")


class RefusedError(Exception):
    """A request is not served.

    Attributes:
        status: Of HTTP.
        sentence: What is wrong and what would be served.
        more: What else the answer says.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        more: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, sentence, more, headers)
        self.status, self.sentence = status, sentence
        self.more, self.headers = more or {}, headers or {}


def token() -> str | None:
    """What a client must know to change something; ``None`` where nothing was set."""
    return config.resolve().monitor_token


def is_token(given: str) -> bool:
    """Whether somebody knows the token."""
    wanted = token()
    return wanted is not None and hmac.compare_digest(given.encode(), wanted.encode())


def read_only_reason(listening_on: str | None) -> str | None:
    """Why nothing can be changed through a monitor, and the cure; ``None`` if it can.

    Args:
        listening_on: The address it was started on; ``None`` or empty is all of them.
    """
    if is_loopback(listening_on or "") or token() is not None:
        return None
    return (
        f"this monitor listens on {listening_on or 'every address'}, where others reach it, and "
        "has no token, so it is read-only; set TOOLKIT_MONITOR_TOKEN, or start it with "
        "--address=127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_sender(
    request: HTTPConnection, listening_on: str | None, names: Sequence[str] = ()
) -> None:
    """Refuse what a foreign page sent, and every change where there may be none.

    Args:
        request: Of HTTP, or one that asks for a websocket.
        listening_on: The address that the server was started on; ``None`` is all of them.
        names: What else it is called, in front of a proxy for example; ``*`` stands for any text.

    Raises:
        RefusedError: If the request was not meant for us, comes from another site, or would
            change something on a monitor that is read-only.
    """
    host = request.headers.get("host", "")
    # No page makes a browser send the token.
    if not _is_ours(host, (listening_on or "localhost", *names)) and not _has_token(request):
        raise RefusedError(
            403,
            f"this monitor is not called {_short(host)}; use its address, such as "
            "http://localhost, send the token, or name it in server.allowedHosts of "
            "~/.streamlit/config.toml",
        )
    origin = request.headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        raise RefusedError(
            403, f"requests from {_short(origin)} are not served, only from the monitor's own page"
        )
    if request.scope.get("method", "GET") not in _READING:
        _check_writable(request, listening_on)


def _check_writable(request: HTTPConnection, listening_on: str | None) -> None:
    # A server may listen on more than it was told to this package.
    reached_at = (request.scope.get("server") or ("",))[0]
    if reason := read_only_reason(listening_on) or read_only_reason(reached_at):
        raise RefusedError(403, reason)


def check_right(request: Request) -> None:
    """Refuse a change that is not allowed to whoever asks.

    Raises:
        RefusedError: If the token is missing, or the body is not JSON.
    """
    if token() is not None and not _has_token(request):
        raise RefusedError(
            401,
            "this needs the token of the monitor: send the header 'Authorization: Bearer TOKEN' "
            "with what TOOLKIT_MONITOR_TOKEN says",
            headers={"WWW-Authenticate": "Bearer"},
        )
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(
            415, f"a body of {_short(kind or 'no type')} is not taken; send application/json"
        )


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        RefusedError: If it is too large, does not come, or is none.
    """
    too_large = RefusedError(413, f"the body has more than {MOST_BYTES} bytes; send less")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_large
    except ClientDisconnect as error:
        raise RefusedError(400, "the body broke off") from error
    except TimeoutError as error:
        raise RefusedError(
            408,
            f"the body did not come in {BODY_S:g} s: {len(body)} bytes did; send it again",
            headers={"Connection": "close"},
        ) from error
    value = json_value(bytes(body))
    if not isinstance(value, dict):
        raise RefusedError(
            400, 'the body is no JSON object; send one such as {"dataset_names": ["1"]}'
        )
    return value


def _has_token(request: HTTPConnection) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and is_token(given.strip())


def _is_ours(host: str, names: Sequence[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # half a bracket
        return False
    own = socket.gethostname().lower()
    ours = ("localhost", own, f"{own}.local", *map(str.lower, names))
    # A number is nobody's to lead elsewhere: where it leads, it was meant.
    return _is_number(name) or any(fnmatchcase(name, pattern) for pattern in ours)


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _short(text: str) -> str:
    return repr(text[:100])
