"""How the command line prints: tables for people, one JSON object or list for programs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from toolkit.text import one_line

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def print_rows(
    rows: Sequence[Mapping[Any, Any]], columns: list[str], as_json: bool, empty: str = "none"
) -> None:
    """Print the columns of some rows as a table, or all of them as JSON."""
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo(empty)
        return
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    for line in cells:
        padded = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else one_line(str(value))


def print_json(value: object) -> None:
    """Print one value as JSON; a reader who left early is no error."""
    with contextlib.suppress(BrokenPipeError):
        click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
