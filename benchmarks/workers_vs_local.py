"""Images per second of workers against the local road and against one base64 image per task.

Two workers of one thread each and the local road with two threads share this machine's cores
and take turns on the same photos, with their models loaded; so does one solo worker of the
design that this project replaces. Photos travel by path, then as bytes. Also measured: the
server's memory at its highest, and what publishing, claiming and collecting cost an image.
Run it on a quiet machine::

    python benchmarks/workers_vs_local.py FOLDER [--repeats 3] [--size 1024x768] [--copies 4]
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from local_vs_naive import files_of, prepared
from PIL import Image

import toolkit as tk
from toolkit import config
from toolkit.cluster.connection import connect, own_address
from toolkit.cluster.protocol import Keys
from toolkit.dispatch.channel import Channel
from toolkit.dispatch.dispatcher import BATCH_ITEMS
from toolkit.dispatch.job import Job
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.spec import EncoderRequest
from toolkit.records import Batch, Embedded, Item, Outcome
from toolkit.worker.redis_link import RedisLink

HERE = Path(__file__).parent


def copies_of(photos: Path, scratch: Path, n: int) -> Path:
    """The photos ``n`` times, each a content of its own: they differ by their quality."""
    target = scratch / "many"
    target.mkdir()
    for place, file in enumerate(files_of(photos)):
        with Image.open(file) as image:
            for copy in range(n):
                image.convert("RGB").save(target / f"{place:05d}-{copy}.jpg", quality=90 - copy)
    return target


class ServerMemory:
    """The most memory that a server used while this was entered."""

    def __init__(self) -> None:
        self.most_mb = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look every 20 ms."""
        stop = threading.Event()
        address = own_address(config.resolve())
        assert address is not None

        def watch() -> None:
            with connect(address) as client:
                while not stop.wait(0.02):
                    used = int(client.info("memory")["used_memory"])
                    self.most_mb = max(self.most_mb, used / 1e6)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def build_rate(photos: Path, distributed: bool | str, memory: ServerMemory) -> float:
    """Images per second of the embedding stage of a build into an empty store."""
    home = config.resolve().data_dir
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
        (home / name).unlink(missing_ok=True)
    with memory.watched():
        build = tk.build_index(photos, name="bench", distributed=distributed, replace=True)
    record = build.record
    road = "workers" if distributed else "local"
    assert record.images[road] == record.accounting.embedded, record.images
    return record.accounting.embedded / record.embed_seconds


@contextlib.contextmanager
def base64_design(model: Path) -> Iterator[Callable[[list[str]], float]]:
    """One solo worker that takes one picture a task; gives images per second."""
    address = own_address(config.resolve())
    assert address is not None
    os.environ.update(BROKER=f"{address.url}/2", BACKEND=f"{address.url}/3")
    os.environ["MODEL"] = f"local-dir:{model}"
    command = [sys.executable, "-m", "celery", "-A", "base64_worker", "worker"]
    worker = subprocess.Popen([*command, "--pool=solo", "-l", "error"], cwd=HERE)
    sys.path.insert(0, str(HERE))
    from base64_worker import embed

    def run(files: list[str]) -> float:
        begin = time.perf_counter()
        sent = [embed.delay(base64.b64encode(Path(f).read_bytes()).decode()) for f in files]
        rows = np.array([result.get(timeout=600) for result in sent])
        assert len(rows) == len(files)
        return len(files) / (time.perf_counter() - begin)

    try:
        run([os.fspath(next(Path(tk.__file__).parent.glob("samples/photos/*/*.webp")))])
        yield run
    finally:
        worker.terminate()
        worker.wait(30)


def overhead_ms(n_rounds: int = 200) -> float:
    """What publishing, claiming, answering and collecting cost an image, at 64 in a batch."""
    settings, n = config.resolve(), BATCH_ITEMS
    address = own_address(settings)
    assert address is not None
    keys = Keys(settings.namespace)
    channel = Channel("bench", "f" * 64, settings)
    worker = RedisLink(address, keys, "bench")
    items = tuple(Item(i, b"/photos/some/folder/%08d.jpg" % i, 10**6) for i in range(n))
    vectors = np.ones((n, 1280), np.float32)
    embedded = tuple(Embedded(i, bytes(16), i, 1024, 768, "JPEG") for i in range(n))
    begin = time.perf_counter()
    for number in range(n_rounds):
        job = Job("bench", 1, Batch(number, "f" * 64, items), (), 10**9)
        channel.send(job, {})
        assert worker.claim(job) == "ok"
        outcome = Outcome(number, "f" * 64, embedded, (), vectors)
        what = {"outcome": outcome.to_json(), "unseen": []}
        assert worker.answer(job, "done", what, outcome.blob()) == "ok"
        channel.listen(1.0)
        said = channel.listen(1.0)
        assert said is not None
        Outcome.from_json(said["outcome"], channel.vectors(number, 1))
        channel.drop(number, ())
    seconds = time.perf_counter() - begin
    channel.withdraw()
    channel.close()
    return 1000 * seconds / n_rounds / n


def main() -> None:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="1024x768", help="WIDTHxHEIGHT, or as-is")
    parser.add_argument("--copies", type=int, default=4)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        tk.configure(data_dir=Path(scratch) / "data", threads=2)
        photos = copies_of(
            prepared(args.folder, Path(scratch), args.size), Path(scratch), args.copies
        )
        files, request = files_of(photos), EncoderRequest(model=config.resolve().model)
        with warm_executor(request, config.resolve()) as executor:
            executor.start()
        weights = config.resolve().data_dir / "weights" / request.model
        rates: dict[str, list[float]] = {}
        memory = {name: ServerMemory() for name in ("paths", "bytes", "local")}
        with tk.LocalCluster(n_workers=2) as cluster, base64_design(weights) as base64_road:
            cluster.wait_until_ready()
            cost_ms = overhead_ms()
            blind = {"worker_roots": (Path(scratch) / "nowhere",)}
            roads: dict[str, Callable[[], float]] = {
                "local": lambda: build_rate(photos, False, memory["local"]),
                "workers, paths": lambda: build_rate(photos, "require", memory["paths"]),
                "base64": lambda: base64_road(files[: len(files) // args.copies]),
            }
            for _ in range(args.repeats):
                for road, run in roads.items():
                    rates.setdefault(road, []).append(run())
        tk.configure(**blind)
        with tk.LocalCluster(n_workers=2) as cluster:
            cluster.wait_until_ready()
            for _ in range(args.repeats):
                rates.setdefault("local again", []).append(
                    build_rate(photos, False, memory["local"])
                )
                rates.setdefault("workers, bytes", []).append(
                    build_rate(photos, "require", memory["bytes"])
                )
        tk.configure(data_dir=None, threads=None, worker_roots=None)

    print(f"{len(files)} photos {args.size}, {request.model}")
    for road, found in rates.items():
        shown = ", ".join(f"{rate:.1f}" for rate in found)
        print(f"{road:15s} {statistics.median(found):6.1f} images/s, median of {shown}")
    pairs = [
        ("workers, paths", "local"),
        ("workers, bytes", "local again"),
        ("workers, paths", "base64"),
    ]
    for ours, other in pairs:
        ratios = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
        print(f"{ours} / {other}: {statistics.median(ratios):.3f} of {np.round(ratios, 3)}")
    print(f"publish, claim, answer and collect: {cost_ms:.3f} ms an image")
    for name, watched in memory.items():
        print(f"server memory, {name}: at most {watched.most_mb:.1f} MB")


if __name__ == "__main__":
    main()
