"""Commands that open the monitor's page, and Flower beside it."""

from __future__ import annotations

import click

from toolkit import config
from toolkit.cli.main import main

_PORT = click.IntRange(1, 65535)


@main.command()
@click.option("--port", default=8501, show_default=True, type=_PORT, help="Port of the page.")
@click.option(
    "--address",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. On any other the page is read-only, unless "
    "TOOLKIT_MONITOR_TOKEN is set.",
)
@click.option("--flower", "with_flower", is_flag=True, help="Start Flower as well.")
def monitor(port: int, address: str, with_flower: bool) -> None:
    """Show queue, workers and builds in the browser, live, until Ctrl-C.

    The same port answers HTTP: POST /api/build_index, GET /api/runs, /api/health, /metrics;
    /api/openapi.json describes it.
    """
    from toolkit.monitor import launch  # deferred: --help is to take less than 0.3 s

    launch.check_port(address, port)
    launch.check_installed("streamlit")
    from toolkit.monitor.guards import read_only_reason  # deferred: it needs what comes with it

    click.echo(f"monitor: http://{_shown(address)}:{port} (Ctrl-C stops it)")
    if reason := read_only_reason(address):
        click.echo(f"warning: {reason}", err=True)
    launch.serve(config.resolve(), address=address, port=port, with_flower=with_flower)


@main.command()
@click.option("--port", default=5555, show_default=True, type=_PORT, help="Port of Flower.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen on.")
def flower(port: int, address: str) -> None:
    """Start Flower, which shows what Celery itself knows of workers and tasks; read-only."""
    from toolkit.monitor import launch  # deferred, as above

    launch.check_port(address, port)
    launch.check_installed("flower")
    click.echo(f"Flower: http://{_shown(address)}:{port} (read-only; Ctrl-C stops it)")
    launch.run_flower(address=address, port=port)


def _shown(address: str) -> str:
    return f"[{address}]" if ":" in address else address
