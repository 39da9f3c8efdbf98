"""What the tests of whole builds share: the cheap model, the command line, comparing indexes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import toolkit as tk
from toolkit.driver import Build
from toolkit.search import Index

#: timm's smallest real model: 0.3 M parameters, 64-d. Random weights need no download.
CHEAP = {"model": "test_vit", "pretrained": False}
CHEAP_FLAGS = ("--model", "test_vit", "--random-weights")

#: A build of test_vit is called after the model unless it is given a name.
INDEX = "photos@test_vit"


def build(datasets: Any, **options: Any) -> Build:
    """A build with the cheap model."""
    return tk.build_index(datasets, **{**CHEAP, **options})


def run_cli(
    *args: str | Path, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Type a command, as a user would."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "toolkit.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **(env or {})},
    )


def build_cli(*args: str | Path, **options: Any) -> dict[str, Any]:
    """`toolkit build … --json` with the cheap model; its answer, exit code included."""
    done = run_cli("build", *args, *CHEAP_FLAGS, "--json", **options)
    answer = json.loads(done.stdout) if done.stdout else {}
    return {"exit": done.returncode, "stderr": done.stderr, **answer}


def table(index: Index) -> list[tuple[Any, ...]]:
    """An index as a table: everything a user sees of a row, in order, with the vector's bytes."""
    frame = index.to_pandas()
    columns = ["key", "dataset", "path", "paths", "label", "width", "height"]
    vectors = np.asarray(index.vectors)
    return [
        (*row, vectors[n].tobytes())
        for n, row in enumerate(frame[columns].itertuples(index=False, name=None))
    ]


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 60.0) -> None:
    """Wait on a condition; a test that waits in vain says for what."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s:g} s in vain: {what}"
        time.sleep(0.02)


def save_random_weights(path: Path, seed: int) -> None:
    """Weights of the cheap model, in a process of its own: this one is to stay without torch."""
    code = (
        "import sys, timm, torch, safetensors.torch as s; torch.manual_seed(int(sys.argv[2]))\n"
        "s.save_file(timm.create_model('test_vit', num_classes=0).state_dict(), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(seed)], check=True)
