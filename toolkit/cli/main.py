"""The command itself: its errors, exit codes and settings.

Exit codes: 0 done, 1 the work failed or was cancelled, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, NoReturn

import click

from toolkit import config
from toolkit.cli.printing import as_json, print_json
from toolkit.errors import ToolkitError, UsageError

#: Exit code of a process that Ctrl-C ended, as shells have it.
EXIT_INTERRUPTED = 130


class _Cli(click.Group):
    """Turns this package's errors into one sentence and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, print what went wrong, exit."""
        kwargs["standalone_mode"] = False
        try:
            result = super().main(*args, **kwargs)
            sys.exit(result if isinstance(result, int) else 0)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted; what is stored is kept, build again to go on", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except ToolkitError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                _end_quietly()
            click.echo(f"error: {error.strerror}: {error.filename}", err=True)
            sys.exit(1)


def _end_quietly() -> NoReturn:
    """Whoever read our output (``| head``) has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="image-index-toolkit")
@click.option("-v", "--verbose", count=True, help="Log what happens on stderr; twice for more.")
@click.option("--data-dir", help="Where vectors, indexes and runs lie (TOOLKIT_DATA_DIR).")
@click.option("--datasets-dir", help="Where datasets lie (TOOLKIT_DATASETS_DIR).")
def main(verbose: int, data_dir: str | None, datasets_dir: str | None) -> None:
    """Turn folders of images into a searchable vector index.

    \b
    toolkit demo                      see it work on sample photos
    toolkit build ~/Pictures          index a folder
    toolkit search Pictures cat.jpg   find what looks like cat.jpg

    A second build of the same folder embeds only what is new. Every setting is an
    environment variable or a key of toolkit.toml as well; `toolkit settings` shows them.

    Exit codes: 0 done; 1 the work failed, was held or cancelled; 2 wrong use; 130 interrupted.
    """  # noqa: D301  click takes the character itself as the sign not to wrap
    config.configure(data_dir=data_dir, datasets_dir=datasets_dir)
    level = [config.resolve().log_level.upper(), "INFO", "DEBUG"][min(verbose, 2)]
    # The handler's level, not the logger's: a run's own log file takes more than the terminal.
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", handlers=[handler])


@main.command()
@as_json
def settings(as_json: bool) -> None:
    """Show every setting, its value and where that came from."""
    found = config.resolve()
    if as_json:
        print_json(
            {
                field: {"value": config.shown(found, field), "source": source}
                for field, source in found.sources.items()
            }
        )
    else:
        click.echo(repr(found))
