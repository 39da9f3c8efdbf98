"""What a user would run instead of this toolkit, on the same photos and weights.

Each gives the seconds from the first file read to the last vector held, with its model loaded,
and the vectors.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).parent

#: Seconds and vectors, float32 of shape ``(n, dim)``.
Run = tuple[float, NDArray[np.float32]]

#: Images that go through a model at once where a user would set it.
BATCH = 64


class Baselines:
    """The loops, over one model.

    Args:
        model: A name for timm, such as ``local-dir:FOLDER``.
        pretrained: Whether it has weights.
    """

    def __init__(self, model: str, *, pretrained: bool = True) -> None:
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        self._net = timm.create_model(model, pretrained=pretrained, num_classes=0).eval()
        config = timm.data.resolve_data_config({}, model=self._net)
        self._transform: Any = timm.data.create_transform(**config, is_training=False)
        self._size = config["input_size"]

    def naive(self, files: list[str]) -> Run:
        """The loop of timm's documentation: one image at a time, fp32."""
        begin = time.perf_counter()
        rows = [self._net(self._read(file)[None]).numpy()[0] for file in files]
        return time.perf_counter() - begin, np.stack(rows)

    def loader(self, files: list[str]) -> Run:
        """Torch's DataLoader with 2 processes, fp32: the usual next step."""
        self._net(torch.zeros(BATCH, *self._size))
        begin = time.perf_counter()
        loader = torch.utils.data.DataLoader(
            _Files(files, self._read), batch_size=BATCH, num_workers=2
        )
        rows = [self._net(batch).numpy() for batch in loader]
        return time.perf_counter() - begin, np.concatenate(rows)

    def tuned(self, files: list[str]) -> Run:
        """By an expert's hand: draft decoding in threads, channels_last, bf16."""
        # A copy: weights that have been in channels_last make the other loops faster for good.
        net = copy.deepcopy(self._net).to(memory_format=torch.channels_last)
        chunks = [files[start : start + 32] for start in range(0, len(files), 32)]

        def read(chunk: list[str]) -> torch.Tensor:
            batch = torch.stack([self._read(file, draft=(512, 512)) for file in chunk])
            return batch.to(memory_format=torch.channels_last)

        with torch.autocast("cpu", dtype=torch.bfloat16), ThreadPoolExecutor(2) as pool:
            net(torch.zeros(32, *self._size).to(memory_format=torch.channels_last))
            begin = time.perf_counter()
            futures = [pool.submit(read, chunk) for chunk in chunks]
            rows = [net(future.result()).float().numpy() for future in futures]
        return time.perf_counter() - begin, np.concatenate(rows)

    def _read(self, file: str, draft: tuple[int, int] | None = None) -> torch.Tensor:
        with Image.open(file) as image:
            if draft:
                image.draft("RGB", draft)
            pixels: torch.Tensor = self._transform(image.convert("RGB"))
        return pixels


class _Files(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, files: list[str], read: Callable[[str], torch.Tensor]) -> None:
        self._files, self._read = files, read

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self._read(self._files[place])


@contextlib.contextmanager
def base64_design(model: str, server_url: str) -> Iterator[Callable[[list[str]], Run]]:
    """The design that this project replaces: one base64 image per task, one solo worker.

    Args:
        model: A name for timm.
        server_url: A Redis server; its databases 2 and 3 are used.
    """
    os.environ |= {"BROKER": f"{server_url}/2", "BACKEND": f"{server_url}/3", "MODEL": model}
    command = [sys.executable, "-m", "celery", "-A", "base64_worker", "worker"]
    worker = subprocess.Popen([*command, "--pool=solo", "-l", "error"], cwd=HERE)
    from base64_worker import embed  # reads the addresses above

    def run(files: list[str]) -> Run:
        begin = time.perf_counter()
        sent = [embed.delay(base64.b64encode(Path(f).read_bytes()).decode()) for f in files]
        rows = np.array([result.get(timeout=600) for result in sent], np.float32)
        return time.perf_counter() - begin, rows

    try:
        yield run
    finally:
        worker.terminate()
        worker.wait(30)
