"""The command that tries a live set-up and prints a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from toolkit import config
from toolkit.cli.main import main
from toolkit.cli.printing import as_json, print_json

if TYPE_CHECKING:
    from toolkit.verify import Step, VerifyReport


@main.command()
@click.argument("datasets", nargs=-1, metavar="[DATASET]...")
@as_json
def verify(datasets: tuple[str, ...], as_json: bool) -> int:
    """Try server, workers and builds, and print a report to paste.

    One picture goes through a worker, and an index of a few is built on the workers and held
    against a local one: from the sample photos, or from the first pictures of DATASET. Your
    own indexes are not touched. Exit code 1 when something failed.
    """
    from toolkit import verify as live  # deferred, as in the other commands

    settings = config.resolve()
    if as_json:
        report = live.verify(datasets, settings=settings)
        print_json(report.to_json())
        return 0 if report.is_ok else 1
    for name, value in live.machine(settings).items():
        click.echo(f"{name + ':':<12}{value}")
    report = live.verify(datasets, settings=settings, on_step=_print_step)
    _print_end(report)
    return 0 if report.is_ok else 1


def _print_step(step: Step) -> None:
    click.echo(f"{step.status:<5} {step.name:<18} {step.seconds:>5.1f} s  {step.detail}")


def _print_end(report: VerifyReport) -> None:
    n_failed = sum(step.status == "fail" for step in report.steps)
    n_tried = sum(step.status != "skip" for step in report.steps)
    click.echo(f"{n_failed} of {n_tried} failed" if n_failed else f"all {n_tried} work")
    if report.kept:
        click.echo(f"logs and indexes were kept for a look: {report.kept}")
