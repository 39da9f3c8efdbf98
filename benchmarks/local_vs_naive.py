"""Images per second of the local road against the loop of timm's documentation.

The loop takes one image at a time in fp32. Both start with a loaded model, read the same
files and run in turn; the toolkit's figure holds everything from the first file read to the
last vector stored. Run it on a quiet machine::

    python benchmarks/local_vs_naive.py FOLDER [--model NAME] [--repeats 3] [--size 1024x768]

The photos are first written as JPEG of one size, as a camera would give them; ``--size as-is``
takes them as they are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

import toolkit as tk
from toolkit import config
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.spec import EncoderRequest
from toolkit.images.datasets import Source
from toolkit.images.walk import Found, Rules, walk

Road = Callable[[], tuple[float, NDArray[np.float32]]]


def prepared(folder: Path, scratch: Path, size: str) -> Path:
    """The photos of a folder at one size, as JPEG."""
    if size == "as-is":
        return folder
    width, height = map(int, size.split("x"))
    target = scratch / "photos"
    target.mkdir()
    for n, file in enumerate(files_of(folder)):
        with Image.open(file) as image:
            photo = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        photo.save(target / f"{n:05d}.jpg", quality=90)
    return target


def files_of(folder: Path) -> list[str]:
    """Every photo, in the order of an index."""
    found = walk(Source("bench", os.fsencode(folder.absolute())), Rules())
    return [os.fsdecode(p) for p in sorted(f.path for f in found if isinstance(f, Found))]


def naive_road(model: str, weights: Path, files: list[str]) -> Road:
    """One image at a time through plain timm."""
    torch.set_grad_enabled(False)
    name = f"local-dir:{weights}" if weights.is_dir() else model
    net = timm.create_model(name, pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))

    def run() -> tuple[float, NDArray[np.float32]]:
        begin = time.perf_counter()
        rows = [net(transform(Image.open(f).convert("RGB"))[None]).numpy()[0] for f in files]
        seconds = time.perf_counter() - begin
        vectors = np.stack(rows)
        return seconds, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return run


def toolkit_road(request: EncoderRequest, photos: Path) -> Road:
    """A build of a new store, without the start of its process."""
    weights = config.resolve().data_dir / "weights"

    def run() -> tuple[float, NDArray[np.float32]]:
        with tempfile.TemporaryDirectory() as data_dir:
            tk.configure(data_dir=data_dir)
            (Path(data_dir) / "weights").symlink_to(weights)
            with warm_executor(request, config.resolve()) as executor:
                executor.start()
            build = tk.build_index(photos, name="bench", model=request.model, distributed=False)
            with build.index as index:
                vectors = np.array(index.vectors)
            tk.configure(data_dir=None)
            return build.record.embed_seconds, vectors

    return run


def main() -> None:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="1024x768", help="WIDTHxHEIGHT, or as-is")
    args = parser.parse_args()

    request = EncoderRequest(model=args.model)
    with warm_executor(request, config.resolve()) as executor:
        executor.start()  # so that the weights lie where both roads find them
    with tempfile.TemporaryDirectory() as scratch:
        photos = prepared(args.folder, Path(scratch), args.size)
        files = files_of(photos)
        weights = config.resolve().data_dir / "weights" / args.model
        roads = {
            "naive": naive_road(args.model, weights, files),
            "toolkit": toolkit_road(request, photos),
        }
        rates: dict[str, list[float]] = {road: [] for road in roads}
        vectors = {}
        for _ in range(args.repeats):
            for road, run in roads.items():
                seconds, vectors[road] = run()
                rates[road].append(len(files) / seconds)

    print(f"{len(files)} photos {args.size}, {args.model}, torch {torch.__version__}")
    for road, found in rates.items():
        shown = ", ".join(f"{rate:.1f}" for rate in found)
        print(f"{road:8s} {statistics.median(found):6.1f} images/s, median of {shown}")
    ratios = [b / a for a, b in zip(rates["naive"], rates["toolkit"], strict=True)]
    print(f"ratio    {statistics.median(ratios):6.2f}, median of {[round(r, 2) for r in ratios]}")
    cosine = (vectors["naive"] * vectors["toolkit"]).sum(axis=1)
    print(f"cosine between the two: at least {cosine.min():.7f}")


if __name__ == "__main__":
    main()
