"""What users call: wiring only, every decision is made in a room below."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import config
from toolkit.driver import Build, detach, find, run_here
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import DatasetError, SettingError, StorageError
from toolkit.images.datasets import Dataset, Source, list_datasets, resolve_sources
from toolkit.images.walk import DEFAULT_EXCLUDES, Found, Rules, walk
from toolkit.index.vector_index import DTYPE_BYTES
from toolkit.journal import list_runs
from toolkit.pipeline import plan_build
from toolkit.places import runs_dir
from toolkit.query import Query, embed_bytes, file_bytes
from toolkit.request import BuildRequest, PlanReport
from toolkit.search import Index, compare_indexes, published_names

#: Longest index name that is made up from dataset names.
MAX_NAME = 80


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
        precision: ``fp32``, or ``bf16``: up to twice as fast, and no longer the vectors of
            timm; the build measures how far they moved.
        decode: ``full``, or ``reduced``: a JPEG is decoded at a half, a quarter or an eighth
            of its size where the model looks at no more.
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
    return run_here(request, settings) if wait else detach(request, settings)


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
    """A run by its id, or the newest live one, from any process and any machine.

    Raises:
        RunNotFoundError: If there is none.
    """
    return find(run_id, config.resolve())


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
        try:
            with Index.open(name, settings) as index:
                found.append(index.summary())
        except StorageError as error:
            # One index that is damaged hides no other.
            known = dict.fromkeys(("images", "dtype", "recall_at_10", "created"))
            found.append({"name": name, **known, "encoder": str(error), "sources": []})
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
    images: Query | Sequence[Query], *, model: str | None = None, **options: Any
) -> NDArray[np.float32]:
    """Embed pictures without an index.

    Args:
        images: Paths, PIL pictures or arrays of pixels; one alone will do.
        model: Any timm name.
        **options: What else names an encoder, as in :func:`build_index`.

    Returns:
        float32, shape ``(n, dim)``, each row of length 1.

    Raises:
        ImageError: If one cannot be read; the message names it.
        ModelError: If there is no such model, or no weights.
    """
    settings = config.resolve(model=model)
    given: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
    pictures = [file_bytes(image) for image in given]
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
    retry_failed: bool = False,
    replace: bool = False,
    accept_changes: bool = False,
) -> tuple[BuildRequest, config.Settings]:
    """Resolve the settings and check every argument, before anything is touched."""
    settings = config.resolve(device=device, model=model, batch_size=batch_size)
    if distributed not in (True, False, "require"):
        raise SettingError("distributed", distributed, "True, False or 'require'")
    if dtype not in DTYPE_BYTES:
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
        include=(include,) if isinstance(include, str) else tuple(include or ()),
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
        limit=limit,
        dtype=dtype,
        distributed=distributed,
        retry_failed=retry_failed,
        replace=replace,
        accept_changes=accept_changes,
    )
    return request, settings


def _default_name(sources: Sequence[Source], settings: config.Settings) -> str:
    """The datasets' names joined by ``+``, and ``@model`` when that is not the default one."""
    if any(os.sep in source.name for source in sources):
        raise DatasetError("two datasets have the same name; give the index a name=")
    if any(source.origin == "DataFrame" for source in sources):
        raise DatasetError("a DataFrame has no name; give the index a name=")
    name = "+".join(source.name for source in sources)
    if settings.model != config.Settings().model:
        name += f"@{settings.model}"
    if len(name) > MAX_NAME:
        raise DatasetError(
            f"the index would be called {name[:MAX_NAME]}…, more than {MAX_NAME} characters; "
            "give it a name="
        )
    return name
