"""Indexes in clip-retrieval's layout: ``img_emb/img_emb_N.npy`` beside ``metadata_N.parquet``.

What is exported carries ``encoder.json`` too, so that an import elsewhere can be searched
with pictures and is not embedded again there. Without it an index answers vectors only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from toolkit.catalog import open_catalog, transaction
from toolkit.config import Settings
from toolkit.embedding.spec import IMPORTED, EncoderRequest, EncoderSpec
from toolkit.embedding.store import VectorStore
from toolkit.errors import DatasetError, IndexConflictError
from toolkit.images.decode import DECODE_VERSION
from toolkit.index.build import publish, write_version
from toolkit.index.items import Copy, ItemRow
from toolkit.index.version import IndexVersion
from toolkit.journal import new_run_id
from toolkit.places import data_in_use, index_dir, index_lock
from toolkit.records import Embedded, Outcome, show_path

#: Rows of one file, as clip-retrieval writes them.
PART_ROWS = 100_000

#: Rows recorded at once.
_ROWS = 4096


class _Part(NamedTuple):
    vectors: NDArray[np.float32]
    table: dict[str, list[Any]]


def export_version(version: IndexVersion, folder: Path, catalog: sqlite3.Connection) -> int:
    """Write a version as files that other tools read; the number of vectors.

    Args:
        version: What to write.
        folder: Where to; made when it is missing.
        catalog: Tells by what a scan knows each content, so that an import knows it too.

    Raises:
        DatasetError: If the folder holds vectors already.
        OSError: If it cannot be written.
    """
    import pyarrow as pa  # deferred: only an export needs it
    import pyarrow.parquet as pq

    vectors, metadata = folder / "img_emb", folder / "metadata"
    if any(vectors.glob("*.npy")):
        raise DatasetError(f"{vectors} holds vectors already; export to an empty folder")
    vectors.mkdir(parents=True, exist_ok=True)
    metadata.mkdir(exist_ok=True)
    rows = version.iter_rows()
    for part, start in enumerate(range(0, max(version.n, 1), PART_ROWS)):
        block = version.vectors[start : start + PART_ROWS]
        np.save(vectors / f"img_emb_{part}.npy", block)
        taken = list(itertools.islice(rows, len(block)))
        table = {**_columns(taken), "probe": [_probe(catalog, row.image_key) for row in taken]}
        pq.write_table(pa.table(table), metadata / f"metadata_{part}.parquet")
    encoder = {
        "spec": version.manifest["encoder"]["spec"],
        "request": version.manifest["extra"]["request"],
    }
    (folder / "encoder.json").write_text(json.dumps(encoder, indent=2), encoding="utf-8")
    return version.n


def import_folder(folder: Path, name: str, settings: Settings, *, replace: bool) -> int:
    """Read vectors that this or another tool wrote into an index; their number.

    Raises:
        DatasetError: If the folder is not of that layout, or rows and vectors differ.
        IndexConflictError: If the name is taken and ``replace`` is not set.
    """
    target = index_dir(settings.data_dir, name)
    target.mkdir(parents=True, exist_ok=True)
    with index_lock(target, name, ""), data_in_use(settings.data_dir):
        return _import(folder, target, name, settings, replace=replace)


def _import(folder: Path, target: Path, name: str, settings: Settings, *, replace: bool) -> int:
    if (target / "CURRENT").exists() and not replace:
        raise IndexConflictError(name, "would be replaced by the import")
    parts = list(_parts(folder))
    dim = parts[0].vectors.shape[1]
    spec, request = _encoder(folder, dim)
    for number, part in enumerate(parts):
        if part.vectors.shape[1] != spec.dim:
            raise DatasetError(
                f"part {number} of {folder} holds {part.vectors.shape[1]}-d vectors, "
                f"not {spec.dim}-d"
            )
    run = new_run_id()
    with contextlib.closing(open_catalog(settings.data_dir)) as catalog:
        store = VectorStore(catalog, settings.data_dir, spec)
        rows = [row for part in parts for row in _rows(part)]
        with store.writer(run) as writer:
            start = 0
            for part in parts:
                for block in _outcomes(part, rows[start : start + len(part.vectors)], spec, store):
                    first = writer.append(block.vectors)
                    with transaction(catalog):
                        writer.record(block, first, DECODE_VERSION)
                start += len(part.vectors)
            with transaction(catalog):
                query = "INSERT OR IGNORE INTO probes VALUES (?, ?)"
                catalog.executemany(query, [pair for part in parts for pair in _probes(part)])
        unique = list({row.image_key: row for row in rows}.values())
        version = write_version(
            target,
            rows=unique,
            vectors=store.read,
            dim=dim,
            dtype="f16",
            encoder={"fingerprint": spec.fingerprint, "spec": spec.to_json()},
            extra={
                "name": name,
                "sources": [f"import:{folder}"],
                "datasets": sorted({row.dataset for row in unique}),
                "request": request.to_json(),
                "table_digest": "",
                "run_id": run,
            },
            threads=settings.threads,
        )
        publish(target, version)
    return len(unique)


def _probe(catalog: sqlite3.Connection, image_key: bytes) -> str:
    query = "SELECT probe FROM probes WHERE image_key = ?"
    row = catalog.execute(query, (image_key,)).fetchone()
    return row[0].hex() if row else ""


def _columns(rows: list[ItemRow]) -> dict[str, list[Any]]:
    # clip-retrieval names the first column image_path; the others are ours.
    return {
        "image_path": [show_path(row.path) for row in rows],
        "image_key": [row.image_key.hex() for row in rows],
        "dataset": [row.dataset for row in rows],
        "label": [row.label or "" for row in rows],
        "width": [row.width for row in rows],
        "height": [row.height for row in rows],
        "format": [row.format for row in rows],
        # Every file of the content; paths are bytes, which a text column cannot hold.
        "copies": [
            json.dumps([(copy.dataset, copy.path.hex(), copy.label) for copy in row.copies])
            for row in rows
        ],
    }


def _parts(folder: Path) -> Iterator[_Part]:
    import pyarrow.parquet as pq  # deferred: only an import needs it

    found = (folder / "img_emb").glob("img_emb_*.npy")
    files = sorted((f for f in found if f.stem[8:].isdecimal()), key=lambda f: int(f.stem[8:]))
    if not files:
        raise DatasetError(f"no img_emb/img_emb_N.npy in {folder}: not clip-retrieval's layout")
    for file in files:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        table_file = folder / "metadata" / f"metadata_{file.stem[8:]}.parquet"
        table = pq.read_table(table_file).to_pydict() if table_file.exists() else {}
        if vectors.ndim != 2 or len(table.get("image_path", ())) != len(vectors):
            raise DatasetError(
                f"{file} holds {vectors.shape} and {table_file} {len(table.get('image_path', ()))} "
                "rows with image_path; they belong together row by row"
            )
        yield _Part(vectors, table)


def _encoder(folder: Path, dim: int) -> tuple[EncoderSpec, EncoderRequest]:
    try:
        value = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        request = EncoderRequest(model=IMPORTED)
        return EncoderSpec.imported(dim, xxhash.xxh3_128_hexdigest(os.fsencode(folder))), request
    except ValueError as error:
        raise DatasetError(f"{folder / 'encoder.json'} is no JSON: {error}") from error
    try:
        return EncoderSpec.from_json(value["spec"]), EncoderRequest.from_json(value["request"])
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{folder / 'encoder.json'} names no encoder ({error!r})") from error


def _rows(part: _Part) -> Iterator[ItemRow]:
    table = part.table
    n = len(part.vectors)
    blank: list[Any] = [None] * n
    for i in range(n):
        copies = _copies(table, i)
        # Without a content key the vector's own bytes stand for the content.
        key = table.get("image_key", blank)[i]
        own = copies[0].path + part.vectors[i].tobytes()
        yield ItemRow(
            bytes.fromhex(key) if key else xxhash.xxh3_128_digest(own),
            copies[0].dataset,
            copies[0].path,
            copies[0].label,
            int(table.get("width", blank)[i] or 0),
            int(table.get("height", blank)[i] or 0),
            str(table.get("format", blank)[i] or ""),
            copies,
        )


def _probes(part: _Part) -> Iterator[tuple[bytes, bytes]]:
    """By what a scan knows each content."""
    if "probe" in part.table:
        for probe, key in zip(part.table["probe"], part.table["image_key"], strict=True):
            if probe:
                yield bytes.fromhex(probe), bytes.fromhex(key)


def _copies(table: dict[str, list[Any]], i: int) -> tuple[Copy, ...]:
    if "copies" in table:
        known = json.loads(table["copies"][i])
        return tuple(Copy(dataset, bytes.fromhex(path), label) for dataset, path, label in known)
    return (Copy("import", os.fsencode(table["image_path"][i]), ""),)


def _outcomes(
    part: _Part, rows: list[ItemRow], spec: EncoderSpec, store: VectorStore
) -> Iterator[Outcome]:
    """The vectors that are not stored yet, normalised, a block at a time."""
    for start in range(0, len(rows), _ROWS):
        block = np.asarray(part.vectors[start : start + _ROWS], np.float32)
        taken = rows[start : start + len(block)]
        norms = np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise DatasetError(f"rows {start} and on hold a vector that is zero or not finite")
        stored = store.has([row.image_key for row in taken])
        new = [i for i, row in enumerate(taken) if row.image_key not in stored]
        embedded = tuple(
            Embedded(i, row.image_key, n, row.width, row.height, row.format)
            for n, (i, row) in enumerate((i, taken[i]) for i in new)
        )
        yield Outcome(0, spec.fingerprint, embedded, (), (block / norms)[new].astype(np.float32))
