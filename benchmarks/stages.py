"""What each stage of a build costs an image, alone and at its best, and the limit that sets.

    python benchmarks/stages.py [--model NAME] [--size small|large|progressive] [--json FILE]

The limit is cores / (decode + forward): the images per second of a build that did nothing else
and never waited. Each stage runs in as many threads as there are cores, as in a build.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import LARGE, LARGE_PROGRESSIVE, SMALL, photos_of, write_report

from toolkit import config
from toolkit.catalog import open_catalog, transaction
from toolkit.config import Settings
from toolkit.embedding.loading import load_encoder
from toolkit.embedding.preprocess import least_edge
from toolkit.embedding.spec import EncoderRequest
from toolkit.embedding.store import VectorStore
from toolkit.images import resample
from toolkit.images.decode import decode, read_file
from toolkit.images.identity import image_key
from toolkit.index.vector_index import VectorIndex
from toolkit.machine import usable_cpus
from toolkit.records import Embedded, Outcome

#: Times that a stage is measured; the best counts.
ROUNDS = 3

#: Images of a stage.
N_IMAGES = 96


def limit_of(files: Sequence[str], request: EncoderRequest, settings: Settings) -> dict[str, Any]:
    """Milliseconds of a core that each stage takes for an image, and the limit they set.

    Returns:
        Stage → milliseconds; ``engine``; ``limit`` in images per second.
    """
    files, cores = list(files)[:N_IMAGES], usable_cpus()
    engines = None if settings.engine == "torch" else settings.engine_dir
    encoder = load_encoder(
        request, data_dir=settings.data_dir, device="cpu", engine_dir=engines, threads=cores
    )
    if engines is not None:
        resample.load(engines / "kernels")  # as an embedding process does
    edge = least_edge(encoder.spec.preprocessing) if request.decode == "reduced" else None
    datas = [read_file(file.encode())[0] for file in files]
    pictures = [decode(data, least_edge=edge).decoded for data in datas]
    pixels = np.stack([encoder.prepare(picture) for picture in pictures])
    vectors = encoder.encode(pixels)
    with ThreadPoolExecutor(cores) as pool:

        def each(stage: Callable[[Any], Any], values: Sequence[Any]) -> float:
            return _best(lambda: list(pool.map(stage, values))) * cores

        milliseconds = {
            "read": each(lambda file: read_file(file.encode()), files),
            "hash": each(image_key, datas),
            "decode": each(lambda data: decode(data, least_edge=edge), datas),
            "resize": each(encoder.prepare, pictures),
            "forward": _best(lambda: encoder.encode(pixels)) * cores,
            "store": _best(lambda: _store(encoder.spec, vectors)),
            "index": _best(lambda: _index(vectors, cores)) * cores,
        }
    rows = {stage: 1000 * seconds / len(files) for stage, seconds in milliseconds.items()}
    busy = rows["decode"] + rows["resize"] + rows["forward"]
    return {**rows, "engine": encoder.model.engine, "limit": cores * 1000 / busy}


def _best(run: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def _store(spec: Any, vectors: Any) -> None:
    """As a build does it: append, fsync, commit."""
    rows = tuple(
        Embedded(n, n.to_bytes(16, "big"), n, 1024, 768, "JPEG") for n in range(len(vectors))
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(open_catalog(Path(folder))) as catalog,
    ):
        _write(catalog, Path(folder), spec, Outcome(0, spec.fingerprint, rows, (), vectors))


def _write(catalog: sqlite3.Connection, folder: Path, spec: Any, outcome: Outcome) -> None:
    with VectorStore(catalog, folder, spec).writer("bench") as writer:
        first = writer.append(outcome.vectors)
        with transaction(catalog):
            writer.record(outcome, first, 1, 10**9)


def _index(vectors: Any, threads: int) -> None:
    index = VectorIndex.create(vectors.shape[1], "f16")
    index.add(np.arange(len(vectors)), vectors, threads=threads)


def table_of(rows: dict[str, Any]) -> list[str]:
    """The stages as a table of Markdown."""
    stages = [name for name in rows if name not in ("engine", "limit")]
    return [
        "| stage | " + " | ".join(stages) + " |",
        "|---" * (len(stages) + 1) + "|",
        "| ms of a core, an image | " + " | ".join(f"{rows[s]:.2f}" for s in stages) + " |",
        "",
        f"forward by {rows['engine']}; limit **{rows['limit']:.1f}** images/s",
        "",
    ]


def main() -> None:
    """Measure one model on one kind of photo."""
    kinds = {"small": SMALL, "large": LARGE, "progressive": LARGE_PROGRESSIVE}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--size", choices=kinds, default="small")
    parser.add_argument("--folder", type=Path, help="photos to take instead of new ones")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    request = EncoderRequest(args.model, pretrained=not args.random_weights)
    with tempfile.TemporaryDirectory() as scratch:
        files = (
            photos_of(kinds[args.size], Path(scratch) / "photos", N_IMAGES)
            if args.folder is None
            else sorted(map(str, args.folder.iterdir()))
        )
        rows = limit_of(files, request, config.resolve())
    write_report(table_of(rows), rows, args.json)


if __name__ == "__main__":
    main()
