"""From a request to an encoder that is ready: on the fastest engine that is exact here.

Law: which engine runs a model does not show in its vectors. An engine is used when its vectors
of the golden pictures are those of torch; what torch exported for it is kept, so that the next
process need not load torch at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from toolkit.embedding import openvino_model
from toolkit.embedding.encoder import Encoder
from toolkit.embedding.exports import (
    MOST_CRASHES,
    crash_note,
    export_folder,
    is_installed,
    write_crash_note,
)
from toolkit.embedding.openvino_model import EngineError, OpenVinoModel
from toolkit.embedding.spec import (
    LEAST_BF16_COSINE,
    EncoderRequest,
    EncoderSpec,
    SpecCache,
    agree,
    read_json,
    write_json,
)
from toolkit.embedding.weights import WeightsFile, find_weights
from toolkit.errors import ModelError
from toolkit.machine import free_bytes, has_accelerator, usable_cpus

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Exported models that are kept, those used last.
KEEP_EXPORTS = 8

#: Seconds to wait while another process exports the same model.
EXPORT_TIMEOUT_S = 120.0

#: In the folder of an exported model: what it is, and torch's vectors of the golden pictures.
_RECORD = "engine.json"


def load_encoder(
    request: EncoderRequest,
    *,
    data_dir: Path,
    device: str = "auto",
    engine_dir: Path | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    crashes: Sequence[str] = (),
) -> Encoder:
    """Make the model, resolve its spec and remember it.

    Args:
        request: The encoder.
        data_dir: The data folder; weights and resolved specs are kept there.
        device: ``auto``, ``cpu`` or a torch device such as ``cuda:0``.
        engine_dir: Where models exported to another engine are kept; ``None`` lets torch run
            them all.
        threads: Runs of the model side by side on processors; by default as many as this
            process may use.
        batch_size: Images that go through the model at once; by default what the device
            does best.
        crashes: How the processes ended that crashed over this just before. After the first
            one a model is exported anew, after :data:`~toolkit.embedding.exports.MOST_CRASHES`
            torch runs it, from then on.

    Raises:
        ModelError: If timm does not know the model, cannot make it as asked for, or the
            weights are of another one.
        WeightsNotFoundError: If no weights are at hand and the hub gives none.
        SettingError: If there is no such device.
    """
    threads = threads or usable_cpus()
    weights, encoder, exports = find_weights(request, data_dir), None, None
    if engine_dir is not None and is_installed():
        exports = _Exports(engine_dir, threads, batch_size, crashes)
    if exports and (device == "cpu" or (device == "auto" and not has_accelerator())):
        encoder = exports.open(request, weights)
    if encoder is None:
        # Deferred: this is what takes seconds.
        from toolkit.embedding.timm_model import make_plain, obtain_weights
        from toolkit.embedding.torch_model import (
            ACCELERATOR_MICRO_BATCHES,
            TorchModel,
            as_network,
            resolved_device,
        )

        device = resolved_device(device)
        weights = obtain_weights(request, data_dir)
        spec, plain = make_plain(request, weights)
        network = as_network(plain, spec.preprocessing)
        model = TorchModel(network, device, threads, batch_size, request.precision)
        encoder = Encoder(spec, model)
        if not np.isfinite(encoder.golden).all():
            raise ModelError(
                f"{request.model} gives vectors that are not finite; use other weights"
            )
        if device != "cpu" and batch_size is None:
            encoder.tune(ACCELERATOR_MICRO_BATCHES)
        if exports and device == "cpu":
            encoder = exports.make(request, weights, spec, network) or encoder
    cache = SpecCache(data_dir / "specs")
    encoder.spec = cache.settle(
        encoder.spec, encoder.golden, encoder.model.device.partition(":")[0]
    )
    cache.put(request, weights, encoder.spec)
    return encoder


class _Exports:
    """Exported models on disk, each in a folder named by everything it depends on."""

    def __init__(
        self, folder: Path, threads: int, batch_size: int | None, crashes: Sequence[str]
    ) -> None:
        self._folder, self._threads, self._batch_size = folder, threads, batch_size
        self._crashes = crashes

    def open(self, request: EncoderRequest, weights: WeightsFile | None) -> Encoder | None:
        """The encoder on an exported model; ``None`` when torch has to run it."""
        if request.has_weights and weights is None:
            return None
        folder = export_folder(self._folder, request, weights)
        if self._crashes:
            # It may be damaged in a way that kills whoever reads it.
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return self._open(folder, request)

    def _open(self, folder: Path, request: EncoderRequest) -> Encoder | None:
        record = read_json(folder / _RECORD)
        if "golden" not in record or crash_note(folder, request.precision).exists():
            return None
        exact = EncoderSpec.from_json(record["spec"])
        spec = dataclasses.replace(exact, precision=request.precision, decode=request.decode)
        golden = np.array(record["golden"], np.float32)
        try:
            encoder = self._encoder(folder, spec, golden)
        except EngineError as error:
            if spec.precision != exact.precision and self._is_sound(folder, exact, golden):
                logger.warning("torch runs %s in %s: %s", request.model, request.precision, error)
                return None
            logger.warning("the export of %s in %s goes: %s", request.model, folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # read only, or pruned by another process
            os.utime(folder)
        return encoder

    def make(
        self,
        request: EncoderRequest,
        weights: WeightsFile | None,
        spec: EncoderSpec,
        network: torch.nn.Module,
    ) -> Encoder | None:
        """Export a model and open it; ``None``, with a note for the next time, if it is unfit."""
        folder = export_folder(self._folder, request, weights)
        note = crash_note(folder, request.precision)
        began = time.monotonic()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if len(self._crashes) >= MOST_CRASHES:
                write_crash_note(note, f"its processes crashed ({', then '.join(self._crashes)})")
            if note.exists():
                return None
            with FileLock(self._folder / f".{folder.name}.lock", timeout=EXPORT_TIMEOUT_S):
                # Somebody else may have been faster.
                known = read_json(folder / _RECORD)
                if not known:
                    self._export(folder, spec, network)
        except (OSError, Timeout) as error:
            logger.warning("%s is not exported, torch runs it: %s", request.model, error)
            return None
        encoder = self._open(folder, request)
        if encoder is not None:
            logger.info(
                "%s exported to OpenVINO in %.1f s", request.model, time.monotonic() - began
            )
        return encoder

    def _export(self, folder: Path, spec: EncoderSpec, network: torch.nn.Module) -> None:
        from toolkit.embedding.torch_model import TorchModel  # loaded by whoever made the network

        # What is exported is exact, whatever it will be run in.
        spec = dataclasses.replace(spec, precision="fp32", decode="full")
        plain = Encoder(spec, TorchModel(network, "cpu", self._threads))
        n_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
        if free_bytes(self._folder) < 4 * n_bytes:
            raise OSError("the disk has no room for it")
        record: dict[str, Any] = {"spec": plain.spec.to_json()}
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            try:
                openvino_model.export(network, plain.spec.preprocessing, made)
                self._encoder(made, plain.spec, plain.golden)
                record["golden"] = plain.golden.tolist()
            except EngineError as error:
                record["unfit"] = str(error)
                logger.warning("torch runs the model: %s", error)
            write_json(made / _RECORD, record)
            # What lies there has no record that can be read.
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
        self._prune()

    def _encoder(self, folder: Path, spec: EncoderSpec, golden: NDArray[np.float32]) -> Encoder:
        model = OpenVinoModel(
            folder,
            spec.preprocessing.input_size,
            self._threads,
            self._batch_size,
            spec.precision,
        )
        encoder = Encoder(spec, model)
        if spec.precision == "fp32":
            is_right = agree(golden, encoder.golden, {"cpu"})
        else:
            is_right = bool((golden * encoder.golden).sum(axis=1).min() >= LEAST_BF16_COSINE)
        if not is_right:
            difference = float(np.abs(golden - encoder.golden).max())
            raise EngineError(f"OpenVINO moves its vectors by {difference:.1e}")
        return encoder

    def _is_sound(self, folder: Path, exact: EncoderSpec, golden: NDArray[np.float32]) -> bool:
        """Whether an export serves the exact encoder, whatever else cannot run it."""
        try:
            self._encoder(folder, exact, golden)
        except EngineError:
            return False
        return True

    def _prune(self) -> None:
        with contextlib.suppress(OSError):  # another process does the same
            folders = [record.parent for record in self._folder.glob(f"*/{_RECORD}")]
            folders.sort(key=lambda folder: folder.stat().st_mtime)
            for folder in folders[:-KEEP_EXPORTS]:
                shutil.rmtree(folder, ignore_errors=True)
