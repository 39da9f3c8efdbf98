"""The command that says what works, what does not, and what mends it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from toolkit.cli.main import main
from toolkit.cli.options import with_encoder
from toolkit.cli.printing import as_json, print_json, print_rows

if TYPE_CHECKING:
    from toolkit.health import HealthReport

#: Seconds between two looks of ``--watch``.
_WATCH_S = 2.0


@main.command()
@click.option("--model", help="Model to look for (TOOLKIT_MODEL).")
@with_encoder
@click.option("--quick", is_flag=True, help="Do not load the model on this machine.")
@click.option("--watch", is_flag=True, help="Look again every 2 s, until Ctrl-C.")
@click.option("--dispatch", is_flag=True, help="Send rubbish and a picture to the workers, too.")
@click.option("--require", type=click.Choice(["distributed"]), help="Exit with 1 if it is local.")
@as_json
def doctor(
    model: str | None,
    encoder: dict[str, Any],
    quick: bool,
    watch: bool,
    dispatch: bool,
    require: str | None,
    as_json: bool,
) -> int:
    """Check the way to the workers and this machine, and name the cures.

    The verdict is what a build would do now: distributed (use workers), local (work on this
    machine alone) or broken (fail). Exit code 1 when it is broken.
    """
    report = _look(model, quick, encoder)
    _show(report, as_json, _sent(model, encoder) if dispatch else [])
    try:
        while watch:
            time.sleep(_WATCH_S)  # nothing tells us of a change: it is looked for
            report = _look(model, quick, encoder)
            click.clear()
            _show(report, as_json, [])
    except KeyboardInterrupt:
        pass  # the way to end it
    wanted = {"distributed"} if require else {"distributed", "local"}
    return 0 if report.verdict in wanted else 1


def _look(model: str | None, quick: bool, encoder: dict[str, Any]) -> HealthReport:
    from toolkit.health import check_health  # deferred: --help is to take less than 0.3 s

    return check_health(model, deep=not quick, **encoder)


def _sent(model: str | None, encoder: dict[str, Any]) -> list[dict[str, Any]]:
    from toolkit.health import try_dispatch  # as above

    return try_dispatch(model, **encoder)


def _show(report: HealthReport, as_json: bool, sent: list[dict[str, Any]]) -> None:
    if as_json:
        print_json({**report.to_json(), **({"dispatch": sent} if sent else {})})
        return
    click.echo(repr(report))
    if sent:
        click.echo()
        print_rows(sent, ["what", "id", "state", "seconds", "detail"], as_json=False)
