"""Images per second of the local road against timm's own loop, interleaved in one run.

The loop is the one of timm's documentation: one image at a time, fp32, decode included. Both
start with a loaded model. Run it on a quiet machine::

    python benchmarks/local_vs_naive.py FOLDER [--model NAME] [--repeats 3] [--size 1024x768]

With ``--size`` the photos are first written at that size as JPEG, as a camera would give them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import toolkit as tk
from toolkit import config
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.spec import EncoderRequest
from toolkit.images.walk import Found, Rules, walk
from toolkit.images.datasets import Source


def resized(folder: Path, files: list[Path], size: tuple[int, int]) -> list[Path]:
    """The same photos at one size, as JPEG."""
    out = []
    for n, file in enumerate(files):
        target = folder / f"{n:05d}.jpg"
        with Image.open(file) as image:
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(target, quality=90)
        out.append(target)
    return out


def naive(model: str, weights: Path | None) -> tuple[object, object]:
    """The model and the transform of timm's documentation."""
    import timm
    import torch

    torch.set_grad_enabled(False)
    name = f"local-dir:{weights}" if weights else model
    net = timm.create_model(name, pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_data_config({}, model=net)
    return net, timm.data.create_transform(**data, is_training=False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="1024x768", help="WIDTHxHEIGHT, or 'as-is'")
    args = parser.parse_args()

    import torch

    source = Source("bench", bytes(args.folder.absolute()))
    files = sorted(Path(f.path.decode()) for f in walk(source, Rules()) if isinstance(f, Found))
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        photos.mkdir()
        if args.size == "as-is":
            for n, file in enumerate(files):
                (photos / f"{n:05d}{file.suffix}").symlink_to(file)
        else:
            width, height = map(int, args.size.split("x"))
            resized(photos, files, (width, height))
        taken = sorted(photos.iterdir())
        data_dir = config.resolve().data_dir
        request = EncoderRequest(model=args.model)
        with warm_executor(request, config.resolve()) as executor:
            executor.start()
        weights = data_dir / "weights" / args.model
        net, transform = naive(args.model, weights if weights.is_dir() else None)
        rates: dict[str, list[float]] = {"naive": [], "toolkit": []}
        expected = got = None
        for repeat in range(args.repeats):
            begin = time.perf_counter()
            rows = [net(transform(Image.open(f).convert("RGB"))[None]).numpy()[0] for f in taken]
            rates["naive"].append(len(taken) / (time.perf_counter() - begin))
            expected = np.stack(rows)
            # The whole embedding stage of a build: scan and publish are not in it, the store is.
            tk.configure(data_dir=data_dir, follow_links=True)
            name = f"bench-{repeat}"
            tk.configure(data_dir=Path(scratch) / f"data-{repeat}")
            if weights.is_dir():
                target = Path(scratch) / f"data-{repeat}" / "weights"
                target.mkdir(parents=True)
                (target / args.model).symlink_to(weights)
            with warm_executor(request, config.resolve()) as executor:
                executor.start()
            run = tk.build_index(photos, name=name, model=args.model, distributed=False)
            rates["toolkit"].append(len(taken) / run.record.embed_seconds)
            got = np.asarray(run.index.vectors)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        cosine = (expected * got).sum(1)
        print(f"{len(taken)} photos, {args.model}, torch {torch.__version__}, {args.repeats} repeats")
        for road, found in rates.items():
            print(f"{road:8s} median {statistics.median(found):7.1f} images/s  {[round(r, 1) for r in found]}")  # fmt: skip
        ratios = [b / a for a, b in zip(rates["naive"], rates["toolkit"], strict=True)]
        print(f"ratio    median {statistics.median(ratios):7.2f}  {[round(r, 2) for r in ratios]}")
        print(f"cosine to naive: min {cosine.min():.7f}")


if __name__ == "__main__":
    main()
