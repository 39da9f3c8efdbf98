"""Commands that build, watch and search indexes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from toolkit import config
from toolkit.cli.main import main
from toolkit.cli.options import with_encoder
from toolkit.cli.printing import as_json, print_json, print_rows
from toolkit.errors import RunError
from toolkit.text import seconds_text


@main.command()
@as_json
def datasets(as_json: bool) -> None:
    """List the datasets that have a name.

    These are the folders under the datasets folder; any other path works as well.
    """
    from toolkit import api  # deferred, here and below: --help is to take less than 0.3 s

    rows = api.datasets()
    if not as_json and not rows:
        click.echo(f"no folder under {config.resolve().datasets_dir}; any path works as well")
        return
    print_rows(rows, ["name", "images", "indexes", "path"], as_json)


@main.command()
@click.argument("datasets", nargs=-1, required=True, metavar="NAME|FOLDER|LIST...")
@click.option("--name", help="Name of the index.  [default: the datasets' names joined by +]")
@click.option("--model", help="Any timm name (TOOLKIT_MODEL).")
@with_encoder
@click.option("--head", default="features", help="features, or projection for a CLIP tower.")
@click.option("--img-size", type=int, help="Side of the model's input in pixels.")
@click.option("--global-pool", help="Another pooling than the model's own, by timm's name.")
@click.option("--batch-size", help="Images through the model at once.  [default: auto]")
@click.option("--device", help="auto, cpu, or a torch device such as cuda:0.")
@click.option("--local", is_flag=True, help="Embed in this machine's own process.")
@click.option("--require-workers", is_flag=True, help="Embed on workers or not at all.")
@click.option("--include", multiple=True, help="Take only files that match; may be repeated.")
@click.option("--exclude", multiple=True, help="Leave out what matches, besides the default.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only that many images.")
@click.option("--dtype", default="f16", type=click.Choice(["f32", "f16", "i8"]), show_default=True)
@click.option("--retry-failed", is_flag=True, help="Try again what is known to be no picture.")
@click.option("--replace", is_flag=True, help="Build over an index of other sources or encoder.")
@click.option("--accept-changes", is_flag=True, help="Publish losses that would be held.")
@click.option("--dry-run", is_flag=True, help="Print the plan and an estimate; embed nothing.")
@click.option("--detach", is_flag=True, help="Return at once; the build goes on by itself.")
@as_json
def build(
    datasets: tuple[str, ...],
    local: bool,
    require_workers: bool,
    encoder: dict[str, Any],
    exclude: tuple[str, ...],
    dry_run: bool,
    detach: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Build or update an index.

    A dataset is the name of a folder under the datasets folder, any folder, or a .txt or
    .csv list of files. Only what is new is embedded. Exit code 1 when nothing could be
    published, or the build was held because too much would be lost.
    """
    from toolkit import api
    from toolkit.images.walk import DEFAULT_EXCLUDES

    if local and require_workers:
        raise click.UsageError("--local and --require-workers exclude each other")
    options["distributed"] = "require" if require_workers else not local
    options |= encoder
    options["exclude"] = (*DEFAULT_EXCLUDES, *exclude)
    if dry_run:
        _print_plan(api.plan(list(datasets), **options), as_json)
        return 0
    _say_where()
    try:
        run = api.build_index(list(datasets), wait=not detach, **options)
    except RunError as error:
        if as_json and error.run_id:
            print_json(api.attach(error.run_id).record.summary())
        raise
    _print_run(run, as_json)
    if detach and not as_json:
        click.echo(f"watch it: toolkit attach {run.run_id}; stop it: toolkit cancel {run.run_id}")
    return 1 if run.state == "held" else 0


@main.command()
@click.argument("index")
@click.argument("image")
@click.option("-k", default=12, show_default=True, type=click.IntRange(min=1), help="Hits wanted.")
@click.option("--where", help="A dataset, or a path pattern such as 'cats/*'.")
@click.option("--include-self", is_flag=True, help="Let the image itself be among the hits.")
@click.option("--sheet", type=click.Path(dir_okay=False), help="Write a contact sheet (PNG).")
@as_json
def search(
    index: str,
    image: str,
    k: int,
    where: str | None,
    include_self: bool,
    sheet: str | None,
    as_json: bool,
) -> None:
    """Find the images of INDEX that look like IMAGE."""
    from toolkit import api

    with api.open_index(index) as opened:
        hits = opened.search(image, k=k, where=where, include_self=include_self)
    if as_json:
        print_json([hit.to_json() for hit in hits])
    else:
        click.echo(repr(hits))
    if sheet:
        from toolkit.contact_sheet import write_contact_sheet

        click.echo(f"contact sheet: {write_contact_sheet(image, hits, Path(sheet))}", err=as_json)


@main.command()
@as_json
def indexes(as_json: bool) -> None:
    """List the published indexes."""
    from toolkit import api

    columns = ["name", "images", "encoder", "dtype", "recall_at_10", "created"]
    print_rows(api.indexes(), columns, as_json, empty="no index yet; make one: toolkit build")


@main.command()
@click.argument("run_id", required=False)
@click.option("--failures", is_flag=True, help="List what failed in RUN_ID.")
@click.option("--csv", type=click.Path(dir_okay=False), help="Write what failed to a CSV file.")
@as_json
def runs(run_id: str | None, failures: bool, csv: str | None, as_json: bool) -> None:
    """List the runs, the newest first, or show one."""
    from toolkit import api

    if run_id is None:
        if failures or csv:
            raise click.UsageError("--failures and --csv need a RUN_ID")
        rows = [run.record.summary() for run in api.runs()]
        columns = ["run_id", "index", "state", "found", "indexed", "failed", "embedded", "seconds"]
        print_rows(rows, columns, as_json, empty="no run yet; start one: toolkit build")
        return
    run = api.attach(run_id)
    if csv:
        run.failures.to_csv(csv, index=False)
        click.echo(f"{len(run.failures)} failures: {csv}", err=as_json)
    elif failures:
        print_rows(run.failures.to_dict("records"), ["kind", "path", "reason"], as_json)
    else:
        _print_run(run, as_json)


@main.command()
@click.argument("run_id", required=False)
@as_json
def attach(run_id: str | None, as_json: bool) -> int:
    """Watch a run until it ends: RUN_ID, or the newest live one."""
    from toolkit import api

    run = api.attach(run_id).wait()
    _print_run(run, as_json)
    return 1 if run.state == "held" else 0


@main.command()
@click.argument("run_id")
def cancel(run_id: str) -> None:
    """Stop a run; what is embedded by then is kept."""
    from toolkit import api

    api.attach(run_id).cancel()
    click.echo(f"asked run {run_id} to stop; it looks between batches")


@main.command()
@click.option("--photo", default="monuments/colosseum.webp", help="The sample to query.")
@as_json
def demo(photo: str, as_json: bool) -> None:
    """Build an index of sample photos and search it."""
    from toolkit import demo as sample

    _say_where()
    shown = sample.run(photo)
    if as_json:
        print_json([hit.to_json() for hit in shown.hits])
        return
    click.echo(f"\nnearest to {shown.query}:")
    click.echo(repr(shown.hits))
    click.echo(f"\ncontact sheet: {shown.sheet}")
    click.echo(f"search on:     toolkit search {sample.INDEX} PICTURE")


@main.command(hidden=True)
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def drive(run_dir: Path) -> None:
    """Run a build that was queued; started by `build --detach`."""
    from toolkit import driver

    driver.drive(run_dir)


def _say_where() -> None:
    """At the first use, say where everything will lie."""
    data_dir = config.resolve().data_dir
    if not data_dir.exists():
        click.echo(f"vectors, indexes and runs go to {data_dir} (TOOLKIT_DATA_DIR)", err=True)


def _print_run(run: Any, as_json: bool) -> None:
    if as_json:
        print_json(run.record.summary())
    else:
        click.echo(repr(run))
        if len(failures := run.failures):
            click.echo(f"{len(failures)} failed: toolkit runs {run.run_id} --failures")


def _print_plan(plan: Any, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(plan))
        return
    changes = dataclasses.asdict(plan.changes)
    click.echo(
        f"found {plan.found:,}: " + ", ".join(f"{n:,} {what}" for what, n in changes.items())
    )
    for rule, n in sorted(plan.excluded.items()):
        click.echo(f"left out {n:,}: {rule}")
    estimate = seconds_text(plan.seconds)
    click.echo(f"to embed {plan.to_embed:,} (estimate: {estimate}), reused {plan.reused:,}")
    click.echo(f"known to fail {plan.failed:,}")
    click.echo(f"writes {plan.needed_bytes / 1e6:,.0f} MB of {plan.free_bytes / 1e6:,.0f} MB free")
    if plan.held:
        click.echo(f"would be held: {plan.held} (--accept-changes publishes it)")
