"""How time and memory grow with images and vectors.

    python benchmarks/scale.py [--parts images,vectors,search] [--most-images 100000]
        [--most-vectors 1000000] [--json FILE] [--svg FILE] [--folder FOLDER]

``images``: whole builds of small JPEGs with a small encoder, locally and through two workers,
and each local build again with nothing changed. ``vectors``: the index alone against raw
usearch, and 100 new rows. ``search``: the largest index, opened by map, one query at a time.

Each measurement is a process of its own, so that its memory is its own; Linux only. Behind a
figure that has a bar stands the bar. The whole takes the better part of an hour and 6 GB of
disk: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from publish import N_CENTRES, SEED, build, clustered

import toolkit as tk
from toolkit import config
from toolkit.journal import RunJournal
from toolkit.places import index_dir

#: Sizes, as far as the command line lets them go.
N_IMAGES, N_VECTORS = (1_000, 10_000, 100_000), (1_000, 10_000, 100_000, 1_000_000)

#: Pixels of a picture, and files in a folder.
SIZE, FOLDER_FILES = (64, 48), 1_000

#: The encoder: its forward pass takes next to nothing, so that everything else shows.
ENCODER: dict[str, Any] = {"model": "test_vit", "pretrained": False}

#: Components of a vector, threads of both graphs, and rows added to a published index.
DIM, THREADS, N_NEW = 256, 2, 100

#: Vectors drawn at once, and compared at once.
BLOCK_ROWS = 50_000

#: Queries: timed ones, those before them, those that are checked; and neighbours of each.
N_QUERIES, N_WARM, N_CHECKED, K = 2_000, 50, 200, 10

#: Block of the queries: they are drawn as the vectors are, and none of them is one.
QUERY_BLOCK = 1 << 20

#: Seconds after which a file counts as unchanged by its stat; until then a build reads it again.
SETTLE_S = 2.1

# The first two slow numpy down where they are set; the others name a server that is not ours.
_UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "REDIS_URL", "REDIS_HOST", "REDIS_PORT")


@dataclass(frozen=True)
class Figure:
    """A figure that has a bar.

    Attributes:
        what: What was measured.
        value: How much.
        bar: What it may be at most, or at least.
        unit: Of both.
        is_least: Whether the bar is the least.
        counts: Whether it was measured at the size the bar is meant for.
    """

    what: str
    value: float
    bar: float
    unit: str = ""
    is_least: bool = False
    counts: bool = True

    def __str__(self) -> str:
        met = self.value >= self.bar if self.is_least else self.value <= self.bar
        sign, unit = ">=" if self.is_least else "<=", f" {self.unit}" if self.unit else ""
        verdict = ("met" if met else "MISSED") if self.counts else "not at this size"
        return f"{self.what}: {self.value:.4g}{unit} [{sign} {self.bar:g}{unit}: {verdict}]"


# What runs in a process of its own.


class Memory:
    """The memory of this process, read while this is entered.

    Attributes:
        figures: ``peak_mb``, the most resident memory since the process began; ``own_peak_mb``,
            the most of it that is no mapped file, which the system could not take back;
            ``end_mb``, the resident memory at the end.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def __enter__(self) -> Memory:
        self._most, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # Not ru_maxrss of getrusage: that begins with the peak of the process that forked.
        self.figures = {
            "peak_mb": _status_mb("VmHWM"),
            "own_peak_mb": max(self._most, _status_mb("RssAnon")),
            "end_mb": _status_mb("VmRSS"),
        }

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._most = max(self._most, _status_mb("RssAnon"))


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(name)


@contextlib.contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Seconds of each stage of the build in this block, by the name the journal has for it."""
    begun = [("start", time.perf_counter())]
    seconds: dict[str, float] = {}
    enter = RunJournal.stage

    def noted(journal: RunJournal, name: str, total: int = 0) -> None:
        begun.append((name, time.perf_counter()))
        enter(journal, name, total)

    with mock.patch.object(RunJournal, "stage", noted):
        yield seconds
    begun.append(("", time.perf_counter()))
    for (name, begin), (_, end) in itertools.pairwise(begun):
        seconds[name] = seconds.get(name, 0.0) + end - begin


def step_build(data_dir: str, photos: str, workers: int) -> dict[str, Any]:
    """One build of a folder; through so many workers, if any."""
    tk.configure(data_dir=data_dir)
    build_index = tk.build_index  # loads what it needs, once in a process, before the clock runs
    with contextlib.ExitStack() as stack:
        if workers:
            cluster = tk.LocalCluster(n_workers=workers, **ENCODER)
            stack.enter_context(cluster).wait_until_ready()
        with Memory() as memory, stages() as seconds:
            begin = time.perf_counter()
            road: bool | str = "require" if workers else False
            run = build_index(photos, name="bench", distributed=road, **ENCODER)
            whole = time.perf_counter() - begin
        server_mb = _server_peak_mb() if workers else None
    books, images = run.record.accounting, run.record.images
    assert books.indexed == books.found, books
    assert images.get("workers" if workers else "local", 0) == books.embedded, images
    return {
        "seconds": whole,
        "stages": seconds,
        "embedded": books.embedded,
        "server_peak_mb": server_mb,
        **memory.figures,
    }


def _server_peak_mb() -> float:
    from toolkit.cluster.connection import connect, own_address  # deferred: counts as memory

    address = own_address(config.resolve())
    assert address is not None
    with connect(address) as client:
        return int(client.info("memory")["used_memory_peak"]) / 1e6


def step_index(data_dir: str, file: str, n: int, new: int) -> dict[str, Any]:
    """A version of the first ``n`` vectors, and of ``new`` others spread among them."""
    _warm_up()

    def take(numbers: list[int]) -> NDArray[np.float32]:
        # Mapped anew each time: what was read must not count as memory of the writer.
        return np.asarray(np.load(file, mmap_mode="r")[numbers])

    places = np.linspace(0, n, new, dtype=int)
    numbers = np.insert(np.arange(n), places, np.arange(n, n + new))
    with Memory() as memory:
        built = build(index_dir(Path(data_dir), "bench"), numbers, take, DIM, THREADS)
    return {**asdict(built), **memory.figures}


def _raw_graph() -> Any:
    """An empty graph as the toolkit makes it."""
    from usearch.index import Index  # deferred: counts as memory

    return Index(ndim=DIM, metric="cos", dtype="f16")


def _warm_up() -> None:
    """Load usearch and let it work once, which takes as long as adding some hundred rows."""
    _raw_graph().add(np.arange(1_000), clustered(1_000, DIM), threads=THREADS)


def step_raw(file: str, n: int, target: str) -> dict[str, Any]:
    """The first ``n`` vectors in a graph of usearch and nothing else."""
    vectors = np.load(file, mmap_mode="r")[:n].view(np.ndarray)
    _warm_up()
    with Memory() as memory:
        begin = time.perf_counter()
        graph = _raw_graph()
        graph.add(np.arange(n), vectors, threads=THREADS)
        added = time.perf_counter()
        graph.save(target)
        saved = time.perf_counter()
    Path(target).unlink()
    parameters = [graph.connectivity, graph.expansion_add, graph.expansion_search]
    return {
        "add_s": added - begin,
        "save_s": saved - added,
        "parameters": parameters,
        **memory.figures,
    }


def step_search(data_dir: str) -> dict[str, Any]:
    """Single queries to an index, and how many of the true neighbours they give.

    A vector goes to ``Index.search`` as a picture does: past the checks to the graph, whose
    candidates the float32 vectors rank, and to the table that names the files.
    """
    queries = clustered(N_WARM + N_QUERIES, DIM, QUERY_BLOCK)
    tk.configure(data_dir=data_dir)
    open_index = tk.open_index  # as in step_build
    with Memory() as memory:
        begin = time.perf_counter()
        index = open_index("bench")
        # What a query needs is mapped when it is first asked for.
        assert len(index.vectors) == len(index.usearch) == len(index)
        opened = time.perf_counter()
        answers, took = [], []
        for query in queries:
            asked = time.perf_counter()
            answers.append(index.search(query, k=K))
            took.append(1000 * (time.perf_counter() - asked))
    timed = took[N_WARM:]
    found = np.array([[hit.key for hit in hits] for hits in answers[-N_CHECKED:]])
    true = nearest(index.vectors, queries[-N_CHECKED:], K)
    same = [len(np.intersect1d(a, b)) for a, b in zip(found, true, strict=True)]
    return {
        "n": len(index),
        "open_s": opened - begin,
        "first_ms": took[0],
        "p50_ms": float(np.percentile(timed, 50)),
        "p99_ms": float(np.percentile(timed, 99)),
        "recall_at_10": sum(same) / true.size,
        "is_exact": answers[-1].exact,
        **memory.figures,
    }


def nearest(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int
) -> NDArray[np.int64]:
    """The true nearest rows of each query, int64 ``(m, k)``, block by block."""
    keys = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = queries @ vectors[start : start + BLOCK_ROWS].T
        here = np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)
        scores, keys = np.hstack([scores, block]), np.hstack([keys, here])
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        scores, keys = (np.take_along_axis(a, best, axis=1) for a in (scores, keys))
    return keys


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "build": step_build,
    "index": step_index,
    "raw": step_raw,
    "search": step_search,
}


class Bench:
    """What the parts share: the scratch folder, and the way to a process of its own.

    Args:
        scratch: An empty folder.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    def run(self, step: str, **given: Any) -> dict[str, Any]:
        """Run a step in a process of its own."""
        shown = ", ".join(f"{name} {value}" for name, value in given.items() if name != "data_dir")
        print(f"  {step}: {shown}", file=sys.stderr, flush=True)
        env = {name: value for name, value in os.environ.items() if name not in _UNSET}
        env["TOOLKIT_ENGINE_DIR"] = str(self.scratch / "engines")
        ran = subprocess.run(
            [sys.executable, __file__, "--step", step, json.dumps(given, default=str)],
            env=env,
            cwd=self.scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if ran.returncode:
            raise SystemExit(f"{step} with {given} failed:\n{ran.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return found

    def images(self, sizes: Sequence[int]) -> list[dict[str, Any]]:
        """Builds of so many images: on the local road, again, and through workers."""
        from toolkit.cluster.local import cluster_down

        rows = []
        # The first build of all exports the model to a faster engine, which no size shall pay.
        for n in (8, *sizes):
            photos, home = self.scratch / f"photos-{n}", self.scratch / "home"
            write_images(photos, n)
            time.sleep(SETTLE_S)
            row: dict[str, Any] = {"n": n}
            try:
                for kind, workers in (("local", 0), ("again", 0), ("workers", 2)):
                    if kind == "workers":
                        shutil.rmtree(home)
                    row[kind] = self.run("build", data_dir=home, photos=photos, workers=workers)
                    assert row[kind]["embedded"] == (0 if kind == "again" else n)
            finally:
                # A cluster outlives the process that started it, should that be killed.
                cluster_down(config.resolve(data_dir=home))
            for folder in (photos, home):
                shutil.rmtree(folder)
            rows.append(row)
        return rows[1:]

    def vectors(self, sizes: Sequence[int]) -> list[dict[str, Any]]:
        """Indexes of so many vectors beside raw graphs, turn by turn; then a few new rows."""
        file, rows = self._vectors_file(sizes[-1]), []
        for n in sizes:
            home = self.scratch / f"index-{n}"
            row: dict[str, Any] = {"n": n, "toolkit": [], "raw": []}
            for turn in range(repeats(n)):
                # Whoever comes second finds another machine: they change places.
                for kind in ("raw", "toolkit")[:: -1 if turn % 2 else 1]:
                    row[kind].append(self._raw(n) if kind == "raw" else self._index(home, n))
            row["new"] = self.run("index", data_dir=home, file=file, n=n, new=N_NEW)
            rows.append(row)
            if n != sizes[-1]:
                shutil.rmtree(home)
        return rows

    def search(self, n: int) -> dict[str, Any]:
        """Queries to an index of so many vectors, which the part ``vectors`` may have left."""
        home = self.scratch / f"index-{n}"
        if not home.exists():
            self._vectors_file(n)
            self._index(home, n)
        return self.run("search", data_dir=home)

    def _index(self, home: Path, n: int) -> dict[str, Any]:
        shutil.rmtree(home, ignore_errors=True)
        return self.run("index", data_dir=home, file=self.scratch / "vectors.npy", n=n, new=0)

    def _raw(self, n: int) -> dict[str, Any]:
        file, target = self.scratch / "vectors.npy", self.scratch / "raw.usearch"
        return self.run("raw", file=file, n=n, target=target)

    def _vectors_file(self, most: int) -> Path:
        """The vectors of every size: each takes the first ones, and the next ones as new."""
        file, n = self.scratch / "vectors.npy", most + N_NEW
        if not file.exists():
            out = np.lib.format.open_memmap(file, "w+", np.float32, (n, DIM))
            for block, start in enumerate(range(0, n, BLOCK_ROWS)):
                out[start : start + BLOCK_ROWS] = clustered(min(BLOCK_ROWS, n - start), DIM, block)
            out.flush()
        return file


def repeats(n: int) -> int:
    """How often each way is measured at a size; the largest takes minutes, and once."""
    return 3 if n <= 100_000 else 1


def write_images(folder: Path, n: int) -> None:
    """Small JPEGs of noise, each of its own."""
    from PIL import Image  # deferred: counts as memory

    for number in range(n):
        place = folder / f"{number // FOLDER_FILES:04d}"
        if number % FOLDER_FILES == 0:
            place.mkdir(parents=True)
        pixels = np.random.default_rng((SEED, number)).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number:07d}.jpg")


# What is shown.


def images_figures(rows: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """The bars of the part ``images``."""
    *before, last = rows
    is_full = last["n"] == N_IMAGES[-1]
    n = f"{last['n']:,}"
    yield Figure(f"{n} images again, unchanged", last["again"]["seconds"], 5, "s", counts=is_full)
    for kind in ("local", "workers"):
        for row in before[-1:]:
            more = last[kind]["peak_mb"] - row[kind]["peak_mb"]
            what = f"client's peak memory ({kind}), {row['n']:,} to {n} images"
            yield Figure(what, more, 100, "MB", counts=is_full)
    server_mb = max(row["workers"]["server_peak_mb"] for row in rows)
    yield Figure("server's peak memory", server_mb, 64, "MB")


def graph_ratio(row: Mapping[str, Any]) -> float:
    """Time of adding to the graph in a build, through that of raw usearch."""
    pairs = zip(row["toolkit"], row["raw"], strict=True)
    return statistics.median(a["steps"]["until last of graph"] / b["add_s"] for a, b in pairs)


def whole_ratio(row: Mapping[str, Any]) -> float:
    """Time of a build and its publication, through adding and saving in raw usearch."""
    pairs = zip(row["toolkit"], row["raw"], strict=True)
    return statistics.median(a["seconds"] / (b["add_s"] + b["save_s"]) for a, b in pairs)


def vectors_figures(rows: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """The bars of the part ``vectors``."""
    for row in rows:
        yield Figure(f"graph step / raw usearch, {row['n']:,} rows", graph_ratio(row), 1.1)
    last = rows[-1]
    what, is_full = f"{N_NEW} rows into {last['n']:,}, published", last["n"] == N_VECTORS[-1]
    yield Figure(what, last["new"]["seconds"], 30, "s", counts=is_full)


def search_figures(found: Mapping[str, Any]) -> Iterator[Figure]:
    """The bars of the part ``search``."""
    is_full = found["n"] >= N_VECTORS[-1]
    yield Figure("open by map", found["open_s"], 0.2, "s", counts=is_full)
    yield Figure("p99 of a query", found["p99_ms"], 3, "ms", counts=is_full)
    yield Figure("recall@10", found["recall_at_10"], 0.98, is_least=True, counts=is_full)


def table(heads: str, rows: Sequence[Sequence[object]]) -> str:
    """Columns, the figures to the right."""
    shown = [heads.split("|"), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(value.rjust(width) for value, width in zip(line, widths, strict=True))
        for line in shown
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def images_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Builds: a row for each size and kind."""
    names = ("start", "scan", "load", "embed", "index", "publish")
    heads = f"images|build|s|{'|'.join(names)}|client peak MB|no file|at end|server peak MB"
    memory = ("peak_mb", "own_peak_mb", "end_mb", "server_peak_mb")
    return table(
        heads,
        [
            (row["n"], kind, one["seconds"], *map(one["stages"].get, names), *map(one.get, memory))
            for row in rows
            for kind in ("local", "again", "workers")
            for one in [row[kind]]
        ],
    )


def vectors_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Indexes and raw graphs: medians of each size."""

    def median(kind: str, name: str) -> float:
        return statistics.median(one[name] for one in row[kind])

    lines = []
    for row in rows:
        steps = [one["steps"]["until last of graph"] for one in row["toolkit"]]
        lines.append(
            (
                *(row["n"], len(row["raw"]), median("toolkit", "seconds")),
                *(statistics.median(steps), median("raw", "add_s"), median("raw", "save_s")),
                *(graph_ratio(row), whole_ratio(row), row["new"]["seconds"]),
                *(median("toolkit", "peak_mb"), median("toolkit", "own_peak_mb")),
                *(median("raw", "peak_mb"), median("raw", "own_peak_mb")),
            )
        )
    return table(
        "rows|turns|whole s|graph s|raw add s|raw save s|graph/raw|whole/raw|"
        f"+{N_NEW} rows s|peak MB|no file|raw peak MB|no file",
        lines,
    )


def search_table(found: Mapping[str, Any]) -> str:
    """Queries: one row."""
    names = ("n", "open_s", "first_ms", "p50_ms", "p99_ms", "recall_at_10", "is_exact")
    heads = "rows|open s|first ms|p50 ms|p99 ms|recall@10|all rows compared|peak MB|no file"
    return table(heads, [(*map(found.get, names), found["peak_mb"], found["own_peak_mb"])])


#: Of each part, its table and its figures.
SHOWN: dict[str, tuple[Callable[..., str], Callable[..., Iterator[Figure]]]] = {
    "images": (images_table, images_figures),
    "vectors": (vectors_table, vectors_figures),
    "search": (search_table, search_figures),
}


# A panel: its left upper corner and its size, in pixels.
_LEFT, _TOP, _WIDTH, _HEIGHT, _STEP = 44, 46, 190, 130, 262

#: Marks of large numbers, the largest first; and what a line is called that is drawn as another.
_UNITS, _NAMES = {"M": 1_000_000, "k": 1_000}, {"new": f"+{N_NEW}"}

_STYLE = """<style>
text { font: 11px sans-serif; fill: #57606a } .title { font-weight: bold }
.axis { stroke: #8c959f; fill: none } polyline, circle { fill: none; stroke-width: 2 }
.bar { stroke: #8c959f; stroke-dasharray: 4 3 }
.local, .index { stroke: #0969da } .workers, .usearch { stroke: #bc4c00 }
.again, .new { stroke: #1a7f37 } text[class] { stroke: none }
text.local, text.index { fill: #0969da } text.workers, text.usearch { fill: #bc4c00 }
text.again, text.new { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
text { fill: #9198a1 }
.local, .index { stroke: #4493f8 } .workers, .usearch { stroke: #f0883e }
.again, .new { stroke: #3fb950 }
text.local, text.index { fill: #4493f8 } text.workers, text.usearch { fill: #f0883e }
text.again, text.new { fill: #3fb950 } }
</style>"""


def svg(report: Mapping[str, Any]) -> str:
    """Memory and seconds over images, and below over vectors, as far as they were measured."""
    lines: list[Iterator[str]] = []
    n_rows = 0
    if images := report.get("images"):
        lines += _images_panels(images, n_rows)
        n_rows += 1
    if vectors := report.get("vectors"):
        lines += _vectors_panels(vectors, n_rows)
        n_rows += 1
    width, height = 3 * _STEP, 210 * n_rows
    head = f'viewBox="0 0 {width} {height}" width="{width}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {head}>', _STYLE]
    return "\n".join([*parts, *itertools.chain(*lines), "</svg>"]) + "\n"


def _images_panels(rows: Sequence[Mapping[str, Any]], row: int) -> list[Iterator[str]]:
    def line(kind: str, name: str) -> list[float]:
        return [row[kind][name] for row in rows]

    client = {kind: line(kind, "peak_mb") for kind in ("local", "workers")}
    server = {"workers": line("workers", "server_peak_mb")}
    seconds = {kind: line(kind, "seconds") for kind in ("local", "workers", "again")}
    n = [row["n"] for row in rows]
    return [
        _panel((0, row), "client's peak memory, MB", n, client),
        _panel((1, row), "server's peak memory, MB", n, server, bar=64),
        _panel((2, row), "seconds of a build", n, seconds, is_log=True),
    ]


def _vectors_panels(rows: Sequence[Mapping[str, Any]], row: int) -> list[Iterator[str]]:
    def line(kind: str, name: str) -> list[float]:
        return [statistics.median(one[name] for one in row[kind]) for row in rows]

    memory = {"index": line("toolkit", "peak_mb"), "usearch": line("raw", "peak_mb")}
    seconds = {
        "index": line("toolkit", "seconds"),
        "usearch": line("raw", "add_s"),
        "new": [row["new"]["seconds"] for row in rows],
    }
    n = [row["n"] for row in rows]
    return [
        _panel((0, row), "an index's peak memory, MB", n, memory, of="vectors"),
        _panel((1, row), "seconds of an index", n, seconds, is_log=True, of="vectors"),
    ]


def _panel(
    place: tuple[int, int],
    title: str,
    n: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    *,
    bar: float | None = None,
    is_log: bool = False,
    of: str = "images",
) -> Iterator[str]:
    """One panel at a column and row: their number on a log axis, from 0 upwards or a log one."""
    values = [*itertools.chain(*lines.values()), *([bar] if bar else [])]
    if is_log:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        marks = [10.0**power for power in range(low, high + 1)]
    else:
        unit = 10 ** math.floor(math.log10(max(values)))
        step = next(s * unit for s in (0.2, 0.5, 1, 2, 5) if 4 * s * unit >= max(values))
        marks = [step * k for k in range(math.ceil(max(values) / step) + 1)]

    def x(images: float) -> float:
        span = math.log10(n[-1] / n[0]) or 1
        return _LEFT + _WIDTH * math.log10(images / n[0]) / span

    def y(value: float) -> float:
        f = math.log10 if is_log else float
        low, high = f(marks[0]), f(marks[-1])
        return _TOP + _HEIGHT * (1 - (f(value) - low) / ((high - low) or 1))

    yield f'<g transform="translate({place[0] * _STEP} {210 * place[1]})">'
    yield f'<text class="title" x="{_LEFT}" y="14">{title}</text>'
    yield f'<path class="axis" d="M{_LEFT} {_TOP}v{_HEIGHT}h{_WIDTH}"/>'
    for mark in marks:
        yield f'<text x="{_LEFT - 5}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>'
    for images in n:
        shown = next(
            (f"{images // unit}{mark}" for mark, unit in _UNITS.items() if images >= unit),
            str(images),
        )
        yield f'<text x="{x(images):.1f}" y="{_TOP + _HEIGHT + 15}" text-anchor="middle">{shown}</text>'  # noqa: E501  one element
    if bar is not None:
        yield f'<path class="bar" d="M{_LEFT} {y(bar):.1f}h{_WIDTH}"/>'
        yield f'<text x="{_LEFT + 5}" y="{y(bar) - 4:.1f}">at most {bar:g}</text>'
    for column, (name, line) in enumerate(lines.items()):
        color = f'class="{name}"'
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(n, line, strict=True))
        yield f'<polyline {color} points="{points}"/>'
        for a, b in zip(n, line, strict=True):
            yield f'<circle {color} cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>'
        yield f'<text {color} x="{_LEFT + 60 * column}" y="32">{_NAMES.get(name, name)}</text>'
    yield f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 30}" text-anchor="middle">{of}</text>'  # noqa: E501  one element
    yield "</g>"


def about(sizes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The machine, the versions, what was counted and drawn."""
    from common import machine  # deferred: counts as memory

    return {
        "machine": machine(),
        "load_before": os.getloadavg(),
        "sizes": sizes,
        "encoder": ENCODER,
        "pictures": {"size": SIZE, "files_in_folder": FOLDER_FILES},
        "graph": {"dim": DIM, "centres": N_CENTRES, "dtype": "f16", "threads": THREADS},
        "queries": {"n": N_QUERIES, "warm": N_WARM, "checked": N_CHECKED, "k": K},
        "seed": SEED,
    }


def main() -> None:
    """Measure the parts that are asked for, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="images,vectors,search")
    parser.add_argument("--most-images", type=int, default=N_IMAGES[-1])
    parser.add_argument("--most-vectors", type=int, default=N_VECTORS[-1])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path, help="the growth as a picture")
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, given = args.step
        print(json.dumps(STEPS[step](**json.loads(given))))
        return
    parts = args.parts.split(",")
    if unknown := set(parts) - SHOWN.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    sizes = {
        "images": [n for n in N_IMAGES if n <= args.most_images] or [args.most_images],
        "vectors": [n for n in N_VECTORS if n <= args.most_vectors] or [args.most_vectors],
    }
    report = about(sizes)
    print(*(f"{name}: {json.dumps(value)}" for name, value in report.items()), sep="\n")
    report["figures"] = []
    # So that an end by a signal, too, ends what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="scale-", dir=args.folder) as scratch:
        bench = Bench(Path(scratch).absolute())
        measure: dict[str, Callable[[], Any]] = {
            "images": lambda: bench.images(sizes["images"]),
            "vectors": lambda: bench.vectors(sizes["vectors"]),
            "search": lambda: bench.search(sizes["vectors"][-1]),
        }
        for part, (table_of, figures_of) in SHOWN.items():
            if part not in parts:
                continue
            report[part] = measure[part]()
            figures = list(figures_of(report[part]))
            print(f"\n{part}\n{table_of(report[part])}", *figures, sep="\n", flush=True)
            report["figures"] += [{**asdict(figure), "part": part} for figure in figures]
            report["load_after"] = os.getloadavg()
            # After each part: what took an hour shall outlive an error in the next one.
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
            if args.svg:
                args.svg.write_text(svg(report))


if __name__ == "__main__":
    main()
