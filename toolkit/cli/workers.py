"""Commands for workers, the server, and what goes on between them."""

from __future__ import annotations

import sys
from typing import Any

import click

from toolkit import config
from toolkit.cli.main import main
from toolkit.cli.options import with_encoder
from toolkit.cli.printing import as_json, print_json, print_rows


def _requests(models: tuple[str, ...], encoder: dict[str, Any]) -> list[Any]:
    from toolkit.embedding.spec import EncoderRequest  # deferred, as in the other commands

    return [EncoderRequest(model, **encoder) for model in models or (config.resolve().model,)]


@main.command()
@click.option("--model", "models", multiple=True, help="Model to serve; may be repeated.")
@with_encoder
@click.option(
    "--pool",
    type=click.Choice(["prefork", "solo", "threads"]),
    default="solo" if sys.platform == "win32" else "prefork",
    show_default=True,
    help="Celery's pool; limits are kept in each of them.",
)
@click.option("--devices", default="auto", show_default=True, help="auto, cpu, or cuda:0,cuda:1.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that embed and decode.")
@click.option("--loglevel", default="info", show_default=True, help="debug, info, warning, error.")
def worker(
    models: tuple[str, ...],
    encoder: dict[str, Any],
    pool: str,
    devices: str,
    threads: int | None,
    loglevel: str,
) -> int:
    """Serve builds of other processes and machines, until it is stopped.

    It takes batches from the Redis server that REDIS_HOST or REDIS_URL name, and is started
    again when it dies. One worker runs for each GPU.
    """
    from toolkit.worker import process, supervisor

    asked = _requests(models, encoder)
    settings = config.resolve(threads=threads)
    plan = supervisor.Plan(
        # Without a word on it: what the environment names.
        encoders=asked if models or asked != _requests((), {}) else process.served(),
        devices=supervisor.devices(devices if devices != "auto" else settings.device),
        pool=pool,
        log_level=loglevel,
    )
    return supervisor.supervise(plan, settings)


@main.group()
def cluster() -> None:
    """A server and workers on this machine."""


@cluster.command()
@click.option("--workers", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--model", help="Model that they serve (TOOLKIT_MODEL).")
@with_encoder
def up(workers: int, model: str | None, encoder: dict[str, Any]) -> None:
    """Start them, or what is missing of them; they stay until `toolkit cluster down`."""
    from toolkit.cluster import local

    (request,) = _requests((model,) if model else (), encoder)
    settings = config.resolve()
    local.cluster_up(workers, request, settings)
    _print_status(local.cluster_status(settings))
    click.echo("they are used by the next build; end them: toolkit cluster down")


@cluster.command()
def down() -> None:
    """Stop the workers and the server of this machine's cluster."""
    from toolkit.cluster import local

    was_up = local.cluster_down(config.resolve())
    click.echo("stopped" if was_up else "there is no cluster on this machine")


@cluster.command()
@as_json
def status(as_json: bool) -> None:
    """Show the server and the workers of this machine's cluster."""
    from toolkit.cluster import local

    found = local.cluster_status(config.resolve())
    if as_json:
        print_json(found)
    else:
        _print_status(found)


def _print_status(found: dict[str, Any]) -> None:
    server = found["server"]
    if server is None:
        click.echo("there is no cluster on this machine; start one: toolkit cluster up")
        return
    click.echo(f"server {server['address']}, pid {server['pid']}")
    columns = ["id", "pid", "state", "device", "encoders", "beat_age_s"]
    print_rows(found["workers"], columns, as_json=False, empty="no worker")


@main.group()
def queue() -> None:
    """Batches that wait for workers."""


@queue.command()
@as_json
def show(as_json: bool) -> None:
    """Show what waits and what workers hold, the oldest first."""
    from toolkit.cluster import overview

    found = overview.queue_overview(config.resolve())
    if as_json:
        print_json({name: found[name] for name in ("ready", "unacked", "queues")})
        return
    click.echo(f"ready {found['ready']}, held by workers {found['unacked']}")
    print_rows(found["queues"], ["queue", "ready", "unacked"], as_json=False, empty="no queue")
    columns = ["where", "run", "batch", "attempt", "age_s", "owner"]
    print_rows(found["messages"], columns, as_json=False, empty="no batch waits")
    click.echo("the same, by hand:")
    for line in found["commands"]:
        click.echo(f"  {line}")


@queue.command()
@click.option("--run", "run_id", help="Cancel this run first, and remove what is left of it.")
@as_json
def purge(run_id: str | None, as_json: bool) -> None:
    """Remove the batches of runs whose client is gone, and nothing else."""
    from toolkit.cluster import overview

    removed = overview.purge(config.resolve(), run_id)
    if as_json:
        print_json(removed)
    else:
        print_rows(removed, ["run", "messages"], as_json=False, empty="no dead run left anything")


@main.command()
@click.argument("name", metavar="RUN|WORKER|server")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
def logs(name: str, follow: bool) -> None:
    """Print the log of a run, of a worker of this machine's cluster, or of its server."""
    from toolkit import log_files

    path = log_files.log_path(name, config.resolve())
    if not follow:
        click.echo(log_files.read(path), nl=False)
        return
    for text in log_files.follow(path):
        click.echo(text, nl=False)
