"""Around the builds: fetch a model, export and import an index, see and clear the store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit import config
from toolkit.catalog import open_catalog
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.collect import collect_unused
from toolkit.embedding.spec import EncoderRequest, EncoderSpec
from toolkit.embedding.store import usage
from toolkit.interchange import export_version, import_folder
from toolkit.places import data_in_use
from toolkit.search import Index, published_names


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
    settings = config.resolve()
    with (
        Index.open(name, settings) as index,
        contextlib.closing(open_catalog(settings.data_dir)) as catalog,
    ):
        return export_version(index.version, Path(folder), catalog)


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
    with (
        data_in_use(settings.data_dir, alone=True),
        contextlib.closing(open_catalog(settings.data_dir)) as catalog,
    ):
        return collect_unused(catalog, settings.data_dir, _used(settings))._asdict()


def _used(settings: config.Settings) -> Iterator[tuple[str, bytes]]:
    for name in published_names(settings.data_dir):
        with Index.open(name, settings) as index:
            for row in index.version.iter_rows():
                yield index.encoder.fingerprint, row.image_key
