"""This machine by itself: disk, libraries, and whether the model loads and embeds a picture.

Law: torch is imported in processes of their own, which have a deadline.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from toolkit.config import Settings
from toolkit.dispatch.local import LocalExecutor, warm_executor
from toolkit.embedding.exports import find_crash
from toolkit.embedding.spec import EncoderRequest, EncoderSpec, SpecCache
from toolkit.embedding.weights import find_weights
from toolkit.errors import StorageError, ToolkitError
from toolkit.health.case import variables
from toolkit.health.report import Check, Status
from toolkit.machine import free_bytes, mapped_write
from toolkit.records import Batch, Item
from toolkit.samples import PHOTOS

#: The picture that is embedded here and on a worker.
SAMPLE = PHOTOS / "animals" / "duck.webp"

#: Seconds a model may take to load before the doctor gives up on it; a build waits longer.
LOAD_S = 120.0

#: Seconds an import of torch and timm may take.
IMPORT_S = 60.0

#: Free bytes below which a disk is called nearly full.
FEW_BYTES = 1 << 30

_DISTRIBUTION = "image-index-toolkit"

#: What the workers' road stands on: these and no others have the mends it needs.
_ROAD_LIBRARIES = ("celery", "kombu", "redis")

_QUICK = "not loaded in a quick look"


@dataclasses.dataclass(frozen=True, slots=True)
class Here:
    """What this machine can do without workers.

    Attributes:
        checks: Disk, torch, model and versions.
        spec: What the encoder came to, if that is known.
        vector: The sample picture's, float32 of shape ``(dim,)``, if the model was loaded.
        device: Kind of device that made it.
    """

    checks: tuple[Check, ...]
    spec: EncoderSpec | None = None
    vector: NDArray[np.float32] | None = None
    device: str = ""


def look_here(request: EncoderRequest, settings: Settings, *, deep: bool) -> Here:
    """Check this machine.

    Args:
        request: The encoder.
        settings: Of whoever asks.
        deep: Whether to load the model.
    """
    disk, versions = check_disk(settings), check_versions()
    if not disk:
        skipped = [Check(n, Status.SKIP, "nothing can be written") for n in ("torch", "model")]
        return Here((disk, *skipped, versions))
    if deep:
        model, found = _load(request, settings)
        torch = check_torch(imports=not model)
    else:
        model, found = _known(request, settings), Here((), _cached_spec(request, settings))
        torch = check_torch(imports=False)
    return dataclasses.replace(found, checks=(disk, torch, model, versions))


def check_disk(settings: Settings) -> Check:
    """Whether the data folder can be written, and has room."""
    folder = settings.data_dir
    elsewhere = variables(TOOLKIT_DATA_DIR="~/image-index")
    try:
        with mapped_write(folder / "trial"):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
                file.flush()
    except StorageError as error:
        return Check("disk", Status.FAIL, str(error).partition(";")[0], elsewhere)
    free = free_bytes(folder)
    detail = f"{free / 1e9:,.1f} GB free in {folder}"
    if free < FEW_BYTES:
        return Check("disk", Status.WARN, f"only {detail}", "toolkit store gc")
    return Check("disk", Status.OK, detail)


def check_torch(*, imports: bool) -> Check:
    """Whether torch and timm are there; ``imports``: and can be imported, in a process."""
    libraries = ("torch", "timm")
    if missing := [name for name in libraries if not _is_there(name)]:
        cure = f"pip install {_DISTRIBUTION}"
        return Check("torch", Status.FAIL, f"{' and '.join(missing)} cannot be found", cure)
    found = ", ".join(f"{name} {_version(name)}" for name in libraries)
    if not imports:
        return Check("torch", Status.OK, f"{found} in {sys.prefix}")
    # -P: a file torch.py beside a notebook must not be taken for the library.
    command = [sys.executable, "-P", "-c", "import torch, timm"]
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=IMPORT_S, check=False
        )
        said = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
        problem = said[0] if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"not done in {IMPORT_S:.0f} s"
    if problem is None:
        return Check("torch", Status.OK, f"{found} in {sys.prefix}", latency_ms=_ms(begun))
    return Check(
        "torch",
        Status.FAIL,
        f"torch and timm cannot be imported: {problem}",
        f'{sys.executable} -P -c "import torch, timm"',
        _ms(begun),
    )


def check_versions() -> Check:
    """Whether the libraries of the workers' road are those that this release asks for."""
    try:
        asked = metadata.requires(_DISTRIBUTION) or []
        found = {name: metadata.version(name) for name in _ROAD_LIBRARIES}
    except metadata.PackageNotFoundError as error:
        return Check("versions", Status.SKIP, f"pip has no record of {error.name} in {sys.prefix}")
    wrong = unmet(asked, found)
    if wrong:
        cure = f'pip install --upgrade "{_DISTRIBUTION}"'
        return Check("versions", Status.WARN, "; ".join(wrong), cure)
    return Check("versions", Status.OK, ", ".join(f"{name} {found[name]}" for name in found))


def unmet(asked: Iterable[str], found: Mapping[str, str]) -> list[str]:
    """Which requirements of a distribution are not met.

    Args:
        asked: Lines such as ``celery<5.8,>=5.7; extra == "worker"``.
        found: Name → version that is installed. What is not named here is not looked at.
    """
    wrong = []
    for line in asked:
        match = re.match(r"([\w.-]+)([<>=!~,\d.\s]*)", line)
        if match and match[1] in found:
            clauses = re.findall(r"(<|>=)([\d.]+)", match[2])
            has = _numbers(found[match[1]])
            if not all((has < _numbers(v)) == (sign == "<") for sign, v in clauses):
                wrong.append(f"{match[1]} is {found[match[1]]}, {match[2].strip()} is asked for")
    return wrong


def _load(request: EncoderRequest, settings: Settings) -> tuple[Check, Here]:
    begun = time.perf_counter()
    try:
        with warm_executor(request, settings) as executor:
            spec = _started(executor)
            loaded_ms = _ms(begun)
            data = SAMPLE.read_bytes()
            batch = Batch(0, spec.fingerprint, (Item(0, b"", len(data)),))
            outcome = executor.embed(batch, {0: data})
            device, engine = executor.device, executor.engine
    except ToolkitError as error:
        return _not_loaded(request, error, _ms(begun)), Here((), _cached_spec(request, settings))
    if outcome.failed:
        reason = f"{request.model} loads and cannot embed: {outcome.failed[0].reason}"
        return Check("model", Status.FAIL, reason, "toolkit logs embedder"), Here((), spec)
    detail = f"{spec.describe()} on {device} by {engine}, one picture in {outcome.seconds:.2f} s"
    if settings.engine == "auto":
        detail += _why_not_faster(request, settings, device)
    check = Check("model", Status.OK, detail, latency_ms=loaded_ms)
    return check, Here((), spec, outcome.vectors[0], device.partition(":")[0])


def _why_not_faster(request: EncoderRequest, settings: Settings, device: str) -> str:
    wanted = ("numba", "simplejpeg", *["openvino"] * (device == "cpu"))
    missing = [name for name in wanted if not _is_there(name)]
    if missing:
        command = f"pip install '{_DISTRIBUTION}[fast]'"
        return f"; {command} makes it faster ({', '.join(missing)} missing)"
    crash = find_crash(request, data_dir=settings.data_dir, engine_dir=settings.engine_dir)
    return f"; OpenVINO is not asked, for {crash}" if crash and device == "cpu" else ""


def _started(executor: LocalExecutor) -> EncoderSpec:
    timer = threading.Timer(LOAD_S, executor.close)
    timer.daemon = True
    timer.start()
    try:
        return executor.start()
    finally:
        timer.cancel()


def _not_loaded(request: EncoderRequest, error: ToolkitError, took_ms: float) -> Check:
    # The sentence names a command where one helps; otherwise the process has left its words.
    detail, _, advice = str(error).partition("; ")
    command = re.search(r"`(toolkit [^`]+)`", advice)
    cure = command[1] if command else "toolkit logs embedder"
    return Check("model", Status.FAIL, f"{request.model}: {detail}", cure, took_ms)


def _known(request: EncoderRequest, settings: Settings) -> Check:
    """What can be said of a model without loading it."""
    try:
        weights = find_weights(request, settings.data_dir)
    except ToolkitError as error:
        return _not_loaded(request, error, 0.0)
    if weights is None and request.has_weights:
        detail = f"the weights of {request.model} are not on this machine; {_QUICK}"
        return Check("model", Status.WARN, detail, f"toolkit model pull {request.model}")
    return Check("model", Status.SKIP, _QUICK)


def _cached_spec(request: EncoderRequest, settings: Settings) -> EncoderSpec | None:
    try:
        weights = find_weights(request, settings.data_dir)
    except ToolkitError:
        return None
    return SpecCache(settings.data_dir / "specs").get(request, weights)


def _is_there(library: str) -> bool:
    """Whether a library can be found; that does not rest on what pip has on record."""
    if find_spec(library) is None:
        # Python keeps its listing of a folder, also one read while pip was writing there.
        importlib.invalidate_caches()
    return find_spec(library) is not None


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "(version unknown)"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _ms(begun: float) -> float:
    return round((time.perf_counter() - begun) * 1000, 1)
