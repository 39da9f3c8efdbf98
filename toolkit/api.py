"""What users call: wiring only, every decision is made in a room below."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit import config, display
from toolkit.catalog import open_catalog
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.collect import collect_unused
from toolkit.embedding.spec import EncoderRequest, EncoderSpec
from toolkit.embedding.store import usage
from toolkit.errors import (
    BuildFailedError,
    BuildHeldError,
    BuildInProgressError,
    DatasetError,
    RunCancelledError,
    RunNotFoundError,
    SettingError,
)
from toolkit.images.datasets import Dataset, Source, list_datasets, resolve_sources
from toolkit.images.walk import DEFAULT_EXCLUDES, Found, Rules, walk
from toolkit.interchange import export_version, import_folder
from toolkit.journal import (
    Accounting,
    Progress,
    RunJournal,
    RunRecord,
    RunState,
    RunView,
    find_run,
    list_runs,
    new_run_id,
)
from toolkit.pipeline import (
    BuildRequest,
    PlanReport,
    plan_build,
    run_build,
    runs_dir,
)
from toolkit.search import (
    Index,
    Query,
    compare_indexes,
    embed_bytes,
    file_bytes,
    published_names,
)

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

#: Longest index name that is made up from dataset names.
MAX_NAME = 80

#: Seconds a detached build may take until its journal appears.
DETACH_TIMEOUT_S = 30.0

_detached: list[subprocess.Popen[bytes]] = []


class Build:
    """A run of a build, live or ended; works from any process that sees the data folder."""

    def __init__(self, view: RunView, settings: config.Settings) -> None:
        self._view, self._settings = view, settings

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._view.folder.name

    @property
    def record(self) -> RunRecord:
        """Everything the journal says, as it is now."""
        return self._view.record()

    @property
    def state(self) -> RunState:
        """What it is doing or how it ended."""
        return self.record.state

    @property
    def accounting(self) -> Accounting:
        """The books, in files."""
        return self.record.accounting

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self.record.progress

    @property
    def failures(self) -> pd.DataFrame:
        """A row per failed file: path, kind, reason, dataset. ``.to_csv()`` writes it."""
        import pandas as pd  # deferred: `import toolkit` is to take less than 0.3 s

        return pd.DataFrame(self._view.failures(), columns=["path", "kind", "reason", "dataset"])

    @property
    def index(self) -> Index:
        """The index it published, opened.

        Raises:
            IndexNotFoundError: If nothing is published under that name.
        """
        return Index.open(self.record.index, self._settings)

    def cancel(self) -> None:
        """Ask it to stop; what is embedded by then is kept."""
        self._view.request_cancel()

    def wait(self, timeout_s: float | None = None) -> Build:
        """Wait until it ends, showing how far it is.

        Raises:
            TimeoutError: If it is still live after ``timeout_s`` seconds.
            RunError: As :func:`build_index` raises it.
        """
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        with display.progress() as show:
            while (record := self.record).state.is_live:
                show(record)
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"run {self.run_id} is {record.state} after {timeout_s:g} s")
                time.sleep(0.2)  # a file is polled: no other process can wake us
            show(record)
        _raise_if_failed(record)
        return self

    def publish(self) -> Build:
        """Release a held build: build again, accepting what the guard found.

        Raises:
            RunNotFoundError: If it is not held.
        """
        record = self.record
        if record.state is not RunState.HELD:
            raise RunNotFoundError(f"run {self.run_id} is {record.state}, not held")
        request = BuildRequest.from_json(record.request)
        return _run(dataclasses.replace(request, accept_changes=True), self._settings)

    def logs(self) -> str:
        """The run's log."""
        return self._view.log()

    def __repr__(self) -> str:
        return display.run_text(self.record)

    def _repr_html_(self) -> str:
        return display.run_html(self.record, self._view.failures())


def build_index(
    datasets: Dataset | Sequence[Dataset],
    *,
    name: str | None = None,
    model: str | None = None,
    pretrained: bool = True,
    checkpoint_path: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    global_pool: str | None = None,
    head: str = "features",
    precision: str = "fp32",
    decode: str = "full",
    batch_size: int | str = "auto",
    device: str | None = None,
    distributed: bool | str = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDES,
    limit: int | None = None,
    dtype: str = "f16",
    retry_failed: bool = False,
    replace: bool = False,
    accept_changes: bool = False,
    wait: bool = True,
) -> Build:
    """Turn folders of images into a searchable index.

    What is stored is never embedded again: a second call goes on where the first stopped,
    and does nothing when nothing changed.

    Args:
        datasets: Names of folders under the datasets folder, paths of folders, ``.txt`` or
            ``.csv`` lists, or DataFrames with ``path`` and, if wanted, ``label``.
        name: The index; by default the names of the datasets joined by ``+``, plus
            ``@model`` when that is not the default model.
        model: Any timm name.
        pretrained: ``False`` takes random weights, for tests.
        checkpoint_path: A weights file, or a folder with ``config.json`` and
            ``model.safetensors``.
        img_size: Side of the model's input in pixels, where the model allows it.
        global_pool: timm's pooling, where the model allows it.
        head: ``features``, or ``projection`` for a CLIP tower's own projection.
        precision: ``fp32``.
        decode: ``full``.
        batch_size: Images that go through the model at once, or ``auto``; changes no vector
            by more than 1e-5 a component.
        device: ``auto``, ``cpu`` or a torch device.
        distributed: ``True``: workers if they really work, else local; ``False``: local;
            ``"require"``: workers or nothing.
        include: Patterns of which a file must match one.
        exclude: Patterns that leave files out.
        limit: Take only that many images, the first by path.
        dtype: Precision of the search graph: ``f32``, ``f16`` or ``i8``.
        retry_failed: Try again what is known to be no picture.
        replace: Build anew over an index with other sources or another encoder.
        accept_changes: Publish losses that the guard would hold.
        wait: ``False`` starts a process that outlives this one and returns at once.

    Returns:
        The run, ended unless ``wait=False``. Its state is ``held`` when the guard refused
        to publish; then ``build.publish()`` releases it.

    Raises:
        UsageError: If the call cannot be served as it was made.
        RunError: If nothing could be published.
        StorageError: If the disk is full or damaged.
    """
    request, settings = _request(
        datasets,
        name=name,
        model=model,
        batch_size=batch_size,
        device=device,
        distributed=distributed,
        include=include,
        exclude=exclude,
        limit=limit,
        dtype=dtype,
        encoder={
            "pretrained": pretrained,
            "checkpoint_path": checkpoint_path,
            "img_size": img_size,
            "global_pool": global_pool,
            "head": head,
            "precision": precision,
            "decode": decode,
        },
        retry_failed=retry_failed,
        replace=replace,
        accept_changes=accept_changes,
    )
    return _run(request, settings) if wait else _detach(request, settings)


def plan(datasets: Dataset | Sequence[Dataset], **options: Any) -> PlanReport:
    """What :func:`build_index` would do with the same arguments; nothing is embedded.

    Raises:
        UsageError: As :func:`build_index`.
    """
    names = {field.name for field in dataclasses.fields(EncoderRequest)} - {"model"}
    encoder = {name: options.pop(name) for name in names & options.keys()}
    request, settings = _request(datasets, encoder=encoder, **options)
    return plan_build(request, settings)


def attach(run_id: str | None = None) -> Build:
    """A run by its id, or the newest live one, from any process.

    Raises:
        RunNotFoundError: If there is none.
    """
    settings = config.resolve()
    return Build(find_run(runs_dir(settings.data_dir), run_id), settings)


def runs() -> list[Build]:
    """Every run on disk, the newest first."""
    settings = config.resolve()
    return [Build(view, settings) for view in list_runs(runs_dir(settings.data_dir))]


def open_index(name: str) -> Index:
    """Open a published index; memory-mapped, it keeps the version it opened.

    Raises:
        IndexNotFoundError: If there is none of that name.
        DamagedIndexError: If its files do not match its manifest.
    """
    return Index.open(name, config.resolve())


def indexes() -> list[dict[str, Any]]:
    """Every published index: name, images, encoder, dtype, recall, sources, when."""
    settings = config.resolve()
    found = []
    for name in published_names(settings.data_dir):
        with Index.open(name, settings) as index:
            found.append(index.summary())
    return found


def datasets() -> list[dict[str, Any]]:
    """Every dataset that has a name: name, path, files with an image's name, indexes over it."""
    settings = config.resolve()
    over = [(index["name"], index["sources"]) for index in indexes()]
    return [
        {
            "name": name,
            "path": str(path),
            "images": sum(
                isinstance(file, Found) for file in walk(Source(name, os.fsencode(path)), Rules())
            ),
            "indexes": [index for index, sources in over if str(path) in sources],
        }
        for name, path in list_datasets(settings.datasets_dir)
    ]


def embed(
    images: Sequence[Query], *, model: str | None = None, **options: Any
) -> NDArray[np.float32]:
    """Embed pictures without an index.

    Args:
        images: Paths, PIL pictures or arrays of pixels.
        model: Any timm name.
        **options: What else names an encoder, as in :func:`build_index`.

    Returns:
        float32, shape ``(n, dim)``, each row of length 1.

    Raises:
        ImageError: If one cannot be read; the message names it.
        ModelError: If there is no such model, or no weights.
    """
    settings = config.resolve(model=model)
    pictures = [file_bytes(image) for image in images]
    request = EncoderRequest(model=settings.model, **options)
    return embed_bytes(pictures, request, settings)[0]


def compare(index_a: Index, index_b: Index, k: int = 10) -> dict[str, Any]:
    """Two encoders over the same pictures.

    Returns:
        ``images``: contents that both hold; ``neighbour_overlap``: mean share of the ``k``
        nearest that they have in common; ``label_precision``: of each, leave-one-out at 1;
        ``images_per_s``: of each one's last build, or ``None``.

    Raises:
        QueryError: If they have no content in common.
    """
    return compare_indexes(index_a, index_b, k, config.resolve().data_dir)


def pull_model(name: str) -> EncoderSpec:
    """Fetch a model's weights once, and load it to see that it works.

    Raises:
        ModelError: If there is no such model.
        WeightsNotFoundError: If its weights cannot be had.
    """
    settings = config.resolve(model=name)
    with warm_executor(EncoderRequest(model=name), settings) as executor:
        return executor.start()


def export_index(name: str, folder: str | os.PathLike[str]) -> int:
    """Write an index in clip-retrieval's layout; the number of vectors.

    Raises:
        IndexNotFoundError: If there is none of that name.
        DatasetError: If the folder holds vectors already.
    """
    with open_index(name) as index:
        return export_version(index.version, Path(folder))


def import_index(folder: str | os.PathLike[str], *, name: str, replace: bool = False) -> Index:
    """Read vectors in clip-retrieval's layout into an index.

    Raises:
        DatasetError: If the folder is not of that layout.
        IndexConflictError: If the name is taken and ``replace`` is not set.
    """
    settings = config.resolve()
    import_folder(Path(folder).absolute(), name, settings, replace=replace)
    return Index.open(name, settings)


def store_usage() -> list[dict[str, Any]]:
    """What the vectors of each encoder take: model, n_vectors, n_bytes, fingerprint."""
    settings = config.resolve()
    with contextlib.closing(open_catalog(settings.data_dir)) as catalog:
        return [row._asdict() for row in usage(catalog, settings.data_dir)]


def store_gc() -> dict[str, int]:
    """Remove vectors that no published index uses.

    Raises:
        BuildInProgressError: If a build is live: its vectors are not in an index yet.
    """
    settings = config.resolve()
    for run in runs():
        if run.state is RunState.RUNNING:
            raise BuildInProgressError(
                f"run {run.run_id} is building; wait for it, or cancel it", run.run_id
            )
    with contextlib.closing(open_catalog(settings.data_dir)) as catalog:
        return collect_unused(catalog, settings.data_dir, _used(settings))._asdict()


def _used(settings: config.Settings) -> Iterator[tuple[str, bytes]]:
    for name in published_names(settings.data_dir):
        with Index.open(name, settings) as index:
            for row in index.version.iter_rows():
                yield index.encoder.fingerprint, row.image_key


def _run(request: BuildRequest, settings: config.Settings) -> Build:
    """Run a build in this process, showing how far it is."""
    journal = _journal(request, settings)
    build = Build(RunView(journal.folder), settings)
    with _logged(journal), display.progress() as show:
        journal.add_sink(show)
        with contextlib.suppress(BuildHeldError):
            run_build(request, settings, journal)
    return build


def drive(run_dir: Path) -> None:
    """Run a build that another process queued; what a detached build's process does."""
    settings = config.resolve()
    record = RunView(run_dir).record()
    journal = RunJournal(run_dir.parent, record)
    with _logged(journal), contextlib.suppress(BuildHeldError):
        run_build(BuildRequest.from_json(record.request), settings, journal)


def _detach(request: BuildRequest, settings: config.Settings) -> Build:
    """Start a process that runs the build and outlives this one."""
    journal = _journal(request, settings)
    journal.release()
    folder = journal.folder
    environment = {**os.environ, **config.as_environment(settings)}
    with open(folder / "run.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "toolkit.cli", "drive", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    # Held until it has ended: a dropped handle of a live process is a warning, and a zombie.
    _detached[:] = [process, *(other for other in _detached if other.poll() is None)]
    build = Build(RunView(folder), settings)
    deadline = time.monotonic() + DETACH_TIMEOUT_S
    while build.state is RunState.QUEUED:
        if process.poll() is not None or time.monotonic() > deadline:
            raise BuildFailedError(
                f"the process of run {build.run_id} did not start; see its log: "
                f"{folder / 'run.log'}",
                build.run_id,
            )
        time.sleep(0.05)  # a file is polled: the other process has no other way to tell
    return build


def _request(
    datasets: Dataset | Sequence[Dataset],
    *,
    encoder: dict[str, Any],
    name: str | None = None,
    model: str | None = None,
    batch_size: int | str | None = None,
    device: str | None = None,
    distributed: bool | str = True,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDES,
    limit: int | None = None,
    dtype: str = "f16",
    **flags: bool,
) -> tuple[BuildRequest, config.Settings]:
    """Resolve the settings and check every argument, before anything is touched."""
    settings = config.resolve(device=device, model=model, batch_size=batch_size)
    if distributed not in (True, False, "require"):
        raise SettingError("distributed", distributed, "True, False or 'require'")
    if dtype not in ("f32", "f16", "i8"):
        raise SettingError("dtype", dtype, "'f32', 'f16' or 'i8'")
    if limit is not None and limit < 1:
        raise SettingError("limit", limit, "a whole number above 0")
    if encoder.get("checkpoint_path"):
        encoder["checkpoint_path"] = str(Path(encoder["checkpoint_path"]).expanduser().absolute())
    sources = resolve_sources(datasets, settings.datasets_dir)
    request = BuildRequest(
        sources=tuple(sources),
        name=name or _default_name(sources, settings),
        encoder=EncoderRequest(model=settings.model, **encoder),
        include=tuple(include or ()),
        exclude=tuple(exclude),
        limit=limit,
        dtype=dtype,
        distributed=distributed,
        **flags,
    )
    return request, settings


def _default_name(sources: Sequence[Source], settings: config.Settings) -> str:
    """The datasets' names joined by ``+``, and ``@model`` when that is not the default one."""
    if any(os.sep in source.name for source in sources):
        raise DatasetError("two datasets have the same name; give the index a name=")
    name = "+".join(source.name for source in sources)
    if settings.model != config.Settings().model:
        name += f"@{settings.model}"
    if len(name) > MAX_NAME:
        raise DatasetError(
            f"the index would be called {name[:MAX_NAME]}…, more than {MAX_NAME} characters; "
            "give it a name="
        )
    return name


def _journal(request: BuildRequest, settings: config.Settings) -> RunJournal:
    record = RunRecord(new_run_id(), request.name, request=request.to_json())
    return RunJournal(runs_dir(settings.data_dir), record)


@contextlib.contextmanager
def _logged(journal: RunJournal) -> Iterator[None]:
    """Send the package's log to the run's file as well, while the run lasts."""
    handler = logging.FileHandler(journal.folder / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("toolkit")
    package.addHandler(handler)
    level = package.level
    package.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


def _raise_if_failed(record: RunRecord) -> None:
    if record.state is RunState.CANCELLED:
        raise RunCancelledError(f"run {record.run_id} was cancelled", record.run_id)
    if record.state in (RunState.FAILED, RunState.INTERRUPTED):
        raise BuildFailedError(f"run {record.run_id} {record.state}: {record.error}", record.run_id)
