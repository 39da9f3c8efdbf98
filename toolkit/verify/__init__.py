"""A live set-up held against its promises: server, workers, one vector, whole builds.

Law: what the user has is not touched. Everything is built in a folder of its own, which goes
away unless something failed in it; and no password is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from toolkit import config
from toolkit.config import Settings
from toolkit.images.datasets import Dataset, resolve_sources
from toolkit.samples import PHOTOS
from toolkit.verify.bench import bench
from toolkit.verify.report import Step, VerifyReport, machine
from toolkit.verify.steps import N_PICTURES, Trials

__all__ = ["N_PICTURES", "Step", "VerifyReport", "machine", "verify"]


def verify(
    datasets: Dataset | Sequence[Dataset] = (),
    *,
    settings: Settings | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> VerifyReport:
    """Try everything that a build with workers needs, on the set-up as it is now.

    Args:
        datasets: What to build from, as :func:`toolkit.build_index` takes it; by default the
            sample photos. The first :data:`N_PICTURES` pictures are used.
        settings: Instead of those of this moment.
        on_step: Told of each step as it ends.

    Raises:
        DatasetError: If a dataset is missing.
        SettingError: If the address of the server is none.
        StorageError: If nothing can be written to the data folder.
    """
    settings = settings or config.resolve()
    sources = resolve_sources(datasets or PHOTOS, settings.datasets_dir)
    steps: list[Step] = []
    with bench(settings) as folders:
        for step in Trials(settings, tuple(sources), folders).run():
            on_step(step)
            steps.append(step)
        has_failed = any(step.status == "fail" for step in steps)
        folders.is_kept = has_failed
    return VerifyReport(machine(settings), tuple(steps), str(folders.top) if has_failed else None)
