"""Where a verification builds: data folders that have the user's weights, and a dataset."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from toolkit.config import Settings
from toolkit.dispatch.local import close_warm
from toolkit.machine import mapped_write
from toolkit.samples import PHOTOS


@dataclasses.dataclass(slots=True)
class Bench:
    """Folders to build in.

    Attributes:
        top: Holds the others, and the log.
        is_kept: Whether it stays for a look.
    """

    top: Path
    is_kept: bool = False

    @property
    def local(self) -> Path:
        """Data folder of what this machine does by itself."""
        return self.top / "local"

    @property
    def datasets(self) -> Path:
        """Datasets folder, of :attr:`dataset` alone."""
        return self.top / "datasets"

    @property
    def dataset(self) -> Path:
        """A few of the sample photos, made when asked for."""
        folder = self.datasets / "photos"
        if not folder.exists():
            shutil.copytree(PHOTOS / "tools", folder)
        return folder

    @property
    def workers(self) -> Path:
        """Data folder of what the workers do."""
        return self.top / "workers"


@contextlib.contextmanager
def bench(settings: Settings) -> Iterator[Bench]:
    """Make the folders, and remove them unless they are to be kept.

    They lie in the user's data folder: weights are large, and a second name for a file works
    on one disk alone.

    Raises:
        StorageError: If they cannot be made.
    """
    with mapped_write(settings.data_dir / "verify"):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        made = Bench(Path(tempfile.mkdtemp(prefix="verify-", dir=settings.data_dir)))
        for folder in (made.local, made.workers):
            _lend_weights(settings.data_dir, folder)
    try:
        with _logged(made.top / "verify.log"):
            yield made
    finally:
        # The child writes its log in there.
        close_warm()
        if not made.is_kept:
            shutil.rmtree(made.top, ignore_errors=True)


def _lend_weights(data_dir: Path, folder: Path) -> None:
    folder.mkdir()
    if (data_dir / "weights").is_dir():
        shutil.copytree(data_dir / "weights", folder / "weights", copy_function=_linked)


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system that cannot
        shutil.copy2(source, target)
    return target


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Write what the package says to a file alone: to fall back on purpose is no news."""
    package = logging.getLogger("toolkit")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level, propagates = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.setLevel(level)
        package.propagate = propagates
        package.removeHandler(handler)
        handler.close()
