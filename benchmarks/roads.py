"""Images per second of every road, and of what a user would run instead.

All ways take turns on the same photos and weights, with their models loaded; ratios are taken
within a round and their medians reported. The toolkit's figures hold everything from the first
file read to the last vector stored. Run it on a quiet machine::

    python benchmarks/roads.py [--parts small,workers,large,vit,command] [--rounds 3]
        [--photos FOLDER] [--json FILE]

``small``: 1024x768 photos, exact and faster modes, and the limit that the stages set.
``workers``: two workers by path and by bytes, the server's memory, and what a message costs.
``large``: 5-megapixel photos, baseline and progressive. ``vit``: a heavier model. ``command``:
the whole command in a new process, for 190 photos.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from baselines import HERE, Baselines, base64_design
from common import LARGE, LARGE_PROGRESSIVE, SMALL, Figures, Kind, photos_of, write_report
from numpy.typing import NDArray
from stages import table_of

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
from toolkit.samples import PHOTOS
from toolkit.worker.redis_link import RedisLink

MODEL = "tf_efficientnet_lite0"
VIT = EncoderRequest("vit_base_patch32_clip_224", pretrained=False)

#: Photos of each part.
N_SMALL, N_LARGE, N_VIT, N_COMMAND = 760, 96, 190, 190

#: The faster modes.
FAST = {
    "toolkit, bf16": {"precision": "bf16"},
    "toolkit, reduced": {"decode": "reduced"},
    "toolkit, bf16 and reduced": {"precision": "bf16", "decode": "reduced"},
}

Vectors = NDArray[np.float32]
Way = Callable[[], tuple[float, Vectors]]


class Bench:
    """Where the toolkit works while it is measured, and what came out.

    Args:
        scratch: A folder of this run.
        photos: Photos to make others of.
        rounds: Times that each way is measured.
        share: Of the usual number of photos.
    """

    def __init__(self, scratch: Path, photos: Path, rounds: int, share: float) -> None:
        self.scratch, self.rounds, self._share = scratch, rounds, share
        self._photos = photos
        self.lines: list[str] = []
        self.json: dict[str, Any] = {}

    def files(self, kind: Kind, n: int) -> list[str]:
        """Photos of one kind; made once."""
        n = max(8, round(n * self._share))
        folder = self.scratch / "photos" / f"{kind.name} {n}".replace(" ", "_")
        if not folder.exists():
            return photos_of(kind, folder, n, self._photos)
        return sorted(map(str, folder.iterdir()))

    def weights(self) -> str:
        """The model with its weights, by a name that timm understands."""
        with warm_executor(EncoderRequest(MODEL), config.resolve()) as executor:
            executor.start()
        return f"local-dir:{config.resolve().data_dir / 'weights' / MODEL}"

    def take_turns(
        self,
        title: str,
        ways: Mapping[str, Way],
        n: int | Mapping[str, int],
        against: Mapping[str, Sequence[tuple[str, float]]],
    ) -> Figures:
        """Measure ways in turn; the vectors of each are held against the first one's."""
        figures, vectors = Figures(title), {}
        for _ in range(self.rounds):
            for way, run in ways.items():
                seconds, vectors[way] = run()
                figures.add(way, (n if isinstance(n, int) else n[way]) / seconds)
        self.lines += figures.lines(against)
        first, *others = vectors
        for way in others:
            cosines = _cosines(vectors[first], vectors[way])
            self.lines.append(
                f"- {way} against {first}: cosine {cosines.mean():.6f}, least {cosines.min():.7f}"
            )
        self.lines.append("")
        self.json[title] = figures.to_json()
        return figures


def _cosines(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    n = min(len(a), len(b))
    a64, b64 = (v[:n].astype(np.float64) for v in (a, b))
    lengths = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    cosines: NDArray[np.float64] = (a64 * b64).sum(axis=1) / lengths
    return cosines


def toolkit_way(files: list[str], request: EncoderRequest, distributed: bool | str = False) -> Way:
    """The embedding stage of a build into an empty store, its model loaded."""
    folder = Path(files[0]).parent

    def run() -> tuple[float, Vectors]:
        settings = config.resolve()
        for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
            (settings.data_dir / name).unlink(missing_ok=True)
        for name in ("vectors", "indexes", "runs"):
            shutil.rmtree(settings.data_dir / name, ignore_errors=True)
        if not distributed:
            with warm_executor(request, settings) as executor:
                executor.start()
        given = {name: value for name, value in request.to_json().items() if name != "seed"}
        build = tk.build_index(folder, name="bench", distributed=distributed, **given)
        record = build.record
        road = "workers" if distributed else "local"
        assert record.images[road] == record.accounting.embedded == len(files), record
        with build.index as index:
            return record.embed_seconds, np.array(index.vectors)

    return run


def small(bench: Bench) -> None:
    """1024x768 photos: exact, faster, and what others do."""
    files = bench.files(SMALL, N_SMALL)
    loops = Baselines(bench.weights())
    exact = EncoderRequest(MODEL)
    ways: dict[str, Way] = {
        "naive loop": lambda: loops.naive(files),
        "DataLoader": lambda: loops.loader(files),
        "hand-tuned": lambda: loops.tuned(files),
        "toolkit": toolkit_way(files, exact),
        "toolkit, torch": _with_torch(toolkit_way(files, exact)),
        **{
            name: toolkit_way(files, dataclasses.replace(exact, **options))
            for name, options in FAST.items()
        },
    }
    against = {
        "toolkit": [("naive loop", 3.0), ("DataLoader", 4.0)],
        **{name: [("hand-tuned", 1.8)] for name in FAST},
    }
    figures = bench.take_turns(f"{MODEL}, {len(files)} photos 1024x768", ways, len(files), against)
    _say_limit(bench, figures, files, exact)


def _with_torch(way: Way) -> Way:
    def run() -> tuple[float, Vectors]:
        tk.configure(engine="torch")
        try:
            return way()
        finally:
            tk.configure(engine=None)

    return run


def _say_limit(bench: Bench, figures: Figures, files: list[str], request: EncoderRequest) -> None:
    # In a process of its own, as a build's: torch's loops live in this one.
    told = bench.scratch / "stages.json"
    command = ["stages.py", "--model", request.model, "--folder", str(Path(files[0]).parent)]
    command += ["--json", str(told)] + ["--random-weights"] * (not request.pretrained)
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=HERE)
    rows = {
        name: value for name, value in json.loads(told.read_text()).items() if name != "machine"
    }
    bench.json[f"{figures.title}, stages"] = rows
    bench.lines += table_of(rows)
    share = figures.median("toolkit") / rows["limit"]
    bench.lines += [f"toolkit / stage limit: **{share:.3f}** (bar 0.92)", ""]


def large(bench: Bench) -> None:
    """5-megapixel photos."""
    loops = Baselines(bench.weights())
    for kind in (LARGE, LARGE_PROGRESSIVE):
        files = bench.files(kind, N_LARGE)
        ways: dict[str, Way] = {
            "naive loop": lambda files=files: loops.naive(files),  # type: ignore[misc]
            "toolkit": toolkit_way(files, EncoderRequest(MODEL)),
            "toolkit, reduced": toolkit_way(files, EncoderRequest(MODEL, decode="reduced")),
        }
        title = f"{MODEL}, {len(files)} photos {kind.name}"
        figures = bench.take_turns(title, ways, len(files), {"toolkit": [("naive loop", 2.0)]})
        _say_limit(bench, figures, files, EncoderRequest(MODEL))


def vit(bench: Bench) -> None:
    """A heavier model, with random weights."""
    files = bench.files(SMALL, N_VIT)
    loops = Baselines(VIT.model, pretrained=False)
    ways: dict[str, Way] = {
        "DataLoader": lambda: loops.loader(files),
        "toolkit": toolkit_way(files, VIT),
    }
    title = f"{VIT.model}, {len(files)} photos 1024x768"
    figures = bench.take_turns(title, ways, len(files), {"toolkit": [("DataLoader", 1.2)]})
    _say_limit(bench, figures, files, VIT)


def workers(bench: Bench) -> None:
    """Two workers of one thread against the local road with two, and the replaced design."""
    files, exact = bench.files(SMALL, N_SMALL), EncoderRequest(MODEL)
    few = files[: len(files) // 4]
    memory = {name: ServerMemory() for name in ("paths", "bytes")}
    model = bench.weights()
    local = toolkit_way(files, exact)
    remote = toolkit_way(files, exact, "require")
    with tk.LocalCluster(n_workers=2) as cluster, contextlib.ExitStack() as stack:
        cluster.wait_until_ready()
        address = own_address(config.resolve())
        assert address is not None
        base64_way = stack.enter_context(base64_design(model, address.url))
        base64_way(few[:4])  # its model loads
        ways = {
            "toolkit, local": local,
            "toolkit, workers by path": memory["paths"].watched(remote),
            "one base64 image per task": lambda: base64_way(few),
        }
        bench.take_turns(
            f"{MODEL}, {len(files)} photos 1024x768, 2 workers by path",
            ways,
            {**dict.fromkeys(ways, len(files)), "one base64 image per task": len(few)},
            {
                "toolkit, workers by path": [
                    ("toolkit, local", 0.95),
                    ("one base64 image per task", 3.0),
                ]
            },
        )
        cost_ms = overhead_ms()
    tk.configure(worker_roots=(bench.scratch / "nowhere",))
    with tk.LocalCluster(n_workers=2) as cluster:
        cluster.wait_until_ready()
        ways = {
            "toolkit, local": local,
            "toolkit, workers by bytes": memory["bytes"].watched(remote),
        }
        bench.take_turns(
            f"{MODEL}, {len(files)} photos 1024x768, 2 workers by bytes",
            ways,
            len(files),
            {"toolkit, workers by bytes": [("toolkit, local", 0.9)]},
        )
    tk.configure(worker_roots=None)
    for name, watched in memory.items():
        bench.lines.append(f"- server memory, {name}: at most {watched.most_mb:.1f} MB (bar 64)")
        bench.json[f"server memory, {name}, MB"] = watched.most_mb
    bench.lines += [f"- publish, claim, answer, collect: {cost_ms:.3f} ms an image (bar 1)", ""]
    bench.json["message, ms an image"] = cost_ms


class ServerMemory:
    """The most memory that the server used during some runs."""

    def __init__(self) -> None:
        self.most_mb = 0.0

    def watched(self, way: Way) -> Way:
        """The same way, with a look at the server every 20 ms."""

        def run() -> tuple[float, Vectors]:
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
                return way()
            finally:
                stop.set()
                thread.join()

        return run


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


#: The script that a user would run for the whole of it.
_NAIVE_SCRIPT = """
import sys, numpy as np, timm, torch
from pathlib import Path
from PIL import Image
torch.set_grad_enabled(False)
net = timm.create_model(sys.argv[1], pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
files = sorted(Path(sys.argv[2]).iterdir())
rows = [net(transform(Image.open(f).convert("RGB"))[None]).numpy()[0] for f in files]
np.save(sys.argv[3], np.stack(rows))
"""


def command(bench: Bench) -> None:
    """The whole command in a new process, from its start to its end."""
    files, model = bench.files(SMALL, N_COMMAND), bench.weights()
    folder, here = str(Path(files[0]).parent), bench.scratch / "command"
    here.mkdir()
    home = config.resolve().data_dir
    figures = Figures(f"{MODEL}, {len(files)} photos, whole command", "s")

    def seconds(*command: str, **env: str) -> float:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, *command],
            check=True,
            capture_output=True,
            env={**os.environ, **env},
        )
        return time.perf_counter() - begin

    def build(name: str, number: int, engines: Path) -> float:
        data = here / f"{name}-{number}"
        data.mkdir()
        # What an earlier build of other photos left.
        (data / "weights").symlink_to(home / "weights")
        given = {"TOOLKIT_DATA_DIR": str(data), "TOOLKIT_ENGINE_DIR": str(engines)}
        return seconds("-m", "toolkit.cli", "build", folder, "--local", **given)

    for number in range(max(bench.rounds, 5)):
        saved = str(here / "naive.npy")
        figures.add("naive script", seconds("-c", _NAIVE_SCRIPT, model, folder, saved))
        known = config.resolve().engine_dir
        figures.add("toolkit build", build("cached", number, known))
        figures.add("toolkit build, the first ever", build("first", number, here / f"e{number}"))
    bench.lines += figures.lines(
        {
            "toolkit build": [("naive script", 0.8)],
            "toolkit build, the first ever": [("naive script", 1.0)],
        }
    )
    bench.json[figures.title] = figures.to_json()


PARTS: dict[str, Callable[[Bench], None]] = {
    "small": small,
    "workers": workers,
    "large": large,
    "vit": vit,
    "command": command,
}


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """A folder of this run, in which the toolkit keeps everything."""
    with tempfile.TemporaryDirectory(prefix="roads-") as name:
        scratch = Path(name)
        # Processes that are started get it from the environment.
        os.environ |= {
            "TOOLKIT_DATA_DIR": str(scratch / "data"),
            "TOOLKIT_ENGINE_DIR": str(scratch / "engines"),
        }
        yield scratch


def main() -> None:
    """Measure the parts that were asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--share", type=float, default=1.0, help="of the photos, to try it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with home() as scratch:
        bench = Bench(scratch, args.photos, args.rounds, args.share)
        for part in args.parts.split(","):
            PARTS[part](bench)
    write_report(bench.lines, bench.json, args.json)


if __name__ == "__main__":
    main()
