"""Starts the page and Flower, each bound to this machine unless somebody says otherwise.

Law: whatever the environment says, Flower is read-only and its API stays shut; a port that is
taken is said in a sentence before anything starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit import config
from toolkit.config import Settings
from toolkit.errors import UsageError
from toolkit.log_files import logs_dir

#: Where Flower is found unless somebody says otherwise.
ADDRESS, FLOWER_PORT = "127.0.0.1", 5555

#: Streamlit's options, as in ``.streamlit/config.toml``, which is at hand only in a clone.
OPTIONS: dict[str, Any] = {
    "server.address": ADDRESS,
    "server.headless": True,
    "server.fileWatcherType": "none",
    "server.maxUploadSize": 64,
    "browser.gatherUsageStats": False,
    "client.showErrorDetails": "none",
    "client.toolbarMode": "minimal",
}

#: Seconds that Flower of this machine may take to say that it is there.
_FLOWER_ANSWERS_S = 0.5

#: Seconds that Flower may take to end before it is killed.
_FLOWER_ENDS_S = 5.0

#: A proxy that the environment names knows nothing of this machine's own ports.
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

_PAGE = Path(__file__).with_name("page.py")


def serve(settings: Settings, *, address: str, port: int, with_flower: bool) -> None:
    """Serve the page and the HTTP door until somebody stops it.

    Args:
        settings: Of a Flower beside it.
        address: What to listen on.
        port: What to listen on.
        with_flower: Whether to start Flower as well, unless it runs already.

    Raises:
        UsageError: If Flower's port is taken.
    """
    import streamlit as st  # deferred: 0.5 s, and an extra that may be missing

    # Deferred: it needs what comes with Streamlit.
    from toolkit.monitor.http import lifespan, middleware, routes

    # Streamlit searches the folder of what was started for its settings and for modules.
    sys.argv[:] = [str(_PAGE)]
    guard = middleware(address, lambda: st.get_option("server.allowedHosts"))
    app = st.App(_PAGE, routes=routes(), middleware=guard, lifespan=lifespan)
    _end_on_signals()
    beside = flower_beside(settings) if with_flower else contextlib.nullcontext()
    with beside, contextlib.suppress(KeyboardInterrupt):  # the way to end it
        app.run(config={**OPTIONS, **_started_on(address, port)})


def _end_on_signals() -> None:
    """Let a signal unwind this process: Flower is to end with us."""
    # The server takes SIGTERM for itself while it runs, and hands it on as it ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A terminal that is closed sends SIGHUP, which Windows does not know and nohup ignores.
    if os.name != "nt" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


@contextlib.contextmanager
def flower_beside(settings: Settings) -> Iterator[None]:
    """Have Flower while a block runs; one that runs already is left to whoever started it."""
    if flower_url() is not None:
        yield
        return
    check_port(ADDRESS, FLOWER_PORT)
    log = logs_dir(settings.data_dir) / "flower.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "toolkit.cli", "flower"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **config.as_environment(settings)},
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=_FLOWER_ENDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_flower(*, address: str, port: int) -> None:
    """Run Flower over this package's Celery app until somebody stops it."""
    from toolkit.cluster.app import worker_app  # deferred: Celery takes 0.3 s

    # It opens Flower's API to every web page that this machine's user visits.
    os.environ.pop("FLOWER_UNAUTHENTICATED_API", None)
    app = worker_app()
    # The command line beats the environment and flowerconfig.py; a socket beats the address.
    options = (f"--address={address}", f"--port={port}", "--unix_socket=", "--read_only=True")
    app.start(["flower", *options])


def flower_url(port: int = FLOWER_PORT) -> str | None:
    """Where Flower answers on this machine, ``None`` if it does not."""
    url = f"http://{ADDRESS}:{port}"
    try:
        with _DIRECTLY.open(f"{url}/healthcheck", timeout=_FLOWER_ANSWERS_S) as answer:
            return url if answer.read(3) == b"OK" else None
    except (OSError, ValueError):
        return None


def _started_on(address: str, port: int) -> dict[str, Any]:
    # On every address Streamlit's welcome asks a host outside for this machine's own.
    return {
        "server.address": address,
        "server.port": port,
        "logger.hideWelcomeMessage": True,
    }


def check_installed(package: str) -> None:
    """Make sure that a package of the extra is there.

    Raises:
        UsageError: If it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"{package} is not installed; install it: pip install 'image-index-toolkit[monitor]'"
        )


def check_port(address: str, port: int) -> None:
    """Make sure that a port can be listened on.

    Raises:
        UsageError: If it is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, port), family=family):
            return
    except OSError as error:
        raise UsageError(
            f"cannot listen on {address} port {port} ({error.strerror}); choose another one "
            "with --port, or end what listens there"
        ) from error
