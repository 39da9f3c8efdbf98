"""Commands for weights, vectors, and indexes that come and go."""

from __future__ import annotations

import click

from toolkit.cli.main import main
from toolkit.cli.printing import as_json, print_json, print_rows


@main.group()
def model() -> None:
    """Weights of models."""


@model.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch the weights of a timm model once, so that builds need no network."""
    from toolkit import housekeeping

    click.echo(f"ready: {housekeeping.pull_model(name).describe()}")


@main.command("export")
@click.argument("index")
@click.argument("folder", type=click.Path(file_okay=False))
def export_index(index: str, folder: str) -> None:
    """Write an index in clip-retrieval's layout.

    These are img_emb/*.npy and metadata/*.parquet, and encoder.json, which lets an import
    elsewhere be searched with pictures.
    """
    from toolkit import housekeeping

    n = housekeeping.export_index(index, folder)
    click.echo(f"{n} vectors in {folder}")


@main.command("import")
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--name", required=True, help="Name of the index.")
@click.option("--replace", is_flag=True, help="Build over an index of that name.")
def import_index(folder: str, name: str, replace: bool) -> None:
    """Read an index in clip-retrieval's layout."""
    from toolkit import housekeeping

    index = housekeeping.import_index(folder, name=name, replace=replace)
    click.echo(repr(index))


@main.group()
def store() -> None:
    """The vectors on disk."""


@store.command()
@as_json
def du(as_json: bool) -> None:
    """Show what the vectors of each encoder take."""
    from toolkit import housekeeping

    rows = housekeeping.store_usage()
    print_rows(rows, ["model", "n_vectors", "n_bytes", "fingerprint"], as_json, empty="empty")


@store.command()
@as_json
def gc(as_json: bool) -> None:
    """Remove vectors that no index uses. Nothing else ever removes one."""
    from toolkit import housekeeping

    found = housekeeping.store_gc()
    if as_json:
        print_json(found)
    else:
        click.echo(f"removed {found['n_vectors']} vectors, {found['n_bytes'] / 1e6:.1f} MB")
