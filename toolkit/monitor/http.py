"""The HTTP door on the page's port: builds started and stopped, runs, health and metrics.

Law: every answer but the metrics is JSON, every error one sentence in ``error``; nothing that
blocks runs in the event loop; and a build that is started here outlives this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from toolkit import config
from toolkit.config import Settings
from toolkit.errors import RunNotFoundError, ServerError, ToolkitError, UsageError
from toolkit.monitor import guards, metrics, orders
from toolkit.monitor.guards import RefusedError
from toolkit.monitor.history import sample_forever
from toolkit.monitor.openapi import DESCRIPTION
from toolkit.monitor.snapshot import take

logger = logging.getLogger(__name__)

#: What serves a request, in a thread of its own: the path's parameter (or an empty text), the
#: body (or an empty one) and the settings of this moment → the answer.
Serve = Callable[[str, dict[str, Any], Settings], Response]


#: Seconds that requests under way may take to end once the server is told to.
ENDS_S = 3


def middleware(
    listening_on: str | None, names: Callable[[], Sequence[str]] = tuple
) -> list[Middleware]:
    """What stands before the page, its websocket and the door, for ``st.App(middleware=…)``.

    Args:
        listening_on: The address that the server was started on; ``None`` is all of them.
            Where others reach it and there is no token, nothing can be changed.
        names: Gives, once the server starts, what else it is called, such as its name at a
            proxy; ``*`` stands for any text.
    """
    return [Middleware(_Guard, listening_on, names)]


def routes() -> list[BaseRoute]:
    """The door's routes, for ``st.App(routes=…)``; without :func:`middleware` all may enter."""

    def door(path: str, **serves: Serve) -> Route:
        return Route(path, _Door(serves))

    return [
        door("/api/build_index", POST=lambda _, body, s: _json(orders.start_build(body, s), 202)),
        door("/api/runs", GET=lambda _, __, s: _json(orders.all_runs(s))),
        door("/api/runs/{run_id}", GET=lambda run, _, s: _json(orders.one_run(run, s))),
        door(
            "/api/runs/{run_id}/cancel",
            POST=lambda run, body, s: _json(orders.cancel(run, body, s), 202),
        ),
        door("/api/health", GET=lambda _, __, s: _json(take(s, patient=True).health.to_json())),
        door("/api/openapi.json", GET=lambda *_: _json(DESCRIPTION)),
        door("/metrics", GET=lambda _, __, s: _metrics(s)),
        # Streamlit answers every other path with its page.
        door("/api/{path:path}"),
    ]


@contextlib.asynccontextmanager
async def lifespan(app: object) -> AsyncIterator[None]:
    """Sample the queues' history while the server runs, for ``st.App(lifespan=…)``."""
    # It would wait for the last byte of every body, and Streamlit lets nobody say otherwise.
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(server, uvicorn.Server):
        server.config.timeout_graceful_shutdown = ENDS_S
    sampling = asyncio.create_task(sample_forever())
    try:
        yield
    finally:
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling


class _Guard:
    """Before the whole app; Streamlit's own check looks at no port and at no name."""

    def __init__(
        self, app: ASGIApp, listening_on: str | None, names: Callable[[], Sequence[str]]
    ) -> None:
        self._app, self._listening_on, self._names = app, listening_on, names()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            request = HTTPConnection(scope)
            try:
                guards.check_sender(request, self._listening_on, self._names)
            except Exception as error:
                response = _refusal(request, error)
                if scope["type"] == "websocket":  # 403 without a word: no page reads one
                    return await send({"type": "websocket.close"})
                return await response(scope, receive, send)
        return await self._app(scope, receive, send)


class _Door:
    """One path; an ASGI app, so that a method which it does not serve is refused as JSON too."""

    def __init__(self, serves: Mapping[str, Serve]) -> None:
        self._serves = serves

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except Exception as error:
            response = _refusal(request, error)
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        if not self._serves:
            raise RefusedError(404, "there is nothing here; /api/openapi.json says what there is")
        if method not in self._serves:
            allowed = ", ".join(self._serves)
            headers = {"Allow": allowed}
            raise RefusedError(
                405, f"this path serves {allowed}, not {method[:20]}", headers=headers
            )
        body: dict[str, Any] = {}
        if method == "POST":
            guards.check_right(request)
            body = await guards.read_object(request)
        run_id = request.path_params.get("run_id", "")
        serve = self._serves[method]
        return await run_in_threadpool(lambda: serve(run_id, body, config.resolve()))


def _refusal(request: HTTPConnection, error: Exception) -> Response:
    """What is answered where something went wrong."""
    match error:
        case RefusedError():
            asked = request.scope.get("method", "websocket")
            logger.info("%s %s: %s", asked, request.url.path, error.sentence)
            return _json({"error": error.sentence, **error.more}, error.status, error.headers)
        case ToolkitError():
            return _json({"error": str(error)}, _status(error))
    logger.error("%s", request.url.path, exc_info=error)
    return _json({"error": "the monitor has a fault; its log says more"}, 500)


def _status(error: ToolkitError) -> int:
    match error:
        case RunNotFoundError():
            return 404
        case UsageError():
            return 400
        case ServerError():
            return 503
    return 500


def _metrics(settings: Settings) -> Response:
    text = metrics.render(take(settings, health=False))
    return Response(text, media_type=metrics.CONTENT_TYPE)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # In ASCII: a path in it may be no text that UTF-8 could write.
    kind = "application/json"
    return Response(json.dumps(value), status, headers=dict(headers or {}), media_type=kind)
