"""A model that OpenVINO runs on processors, from a file that torch wrote once.

Law: exact means exact. OpenVINO would calculate in bf16 where the processor can; it is told
what to calculate in and asked what it took. Torch is needed to export a model, not to run one.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.embedding.spec import Preprocessing

if TYPE_CHECKING:
    import torch

#: Images that go through the model at once, in each of the runs side by side: on 2 cores
#: tf_efficientnet_lite0 does 421, 415, 406, 375 and 353 images/s at 1, 2, 4, 8 and 16, and
#: vit_base_patch32_clip_224 40, 46, 51, 51 and 51.
MICRO_BATCH = 4

#: File of an exported model; its weights lie beside it.
MODEL_FILE = "model.xml"


class EngineError(Exception):
    """OpenVINO does not run this model, or not exactly; torch will."""


class OpenVinoModel:
    """See :class:`toolkit.embedding.encoder.Model`.

    Args:
        folder: Where :func:`export` wrote it.
        input_size: Channels, height and width.
        threads: Runs of the model side by side.
        batch_size: Images that go through it at once.
        precision: ``fp32``, or ``bf16``, for which a processor without it takes fp32.

    Raises:
        EngineError: If it cannot be run, or not in fp32 when that was asked for.
    """

    device = "cpu"
    engine = "openvino"

    def __init__(
        self,
        folder: Path,
        input_size: tuple[int, int, int],
        threads: int,
        batch_size: int | None = None,
        precision: str = "fp32",
    ) -> None:
        openvino = _openvino()
        self.micro_batch, self.n_lanes = batch_size or MICRO_BATCH, threads
        channels, height, width = input_size
        try:
            core = _core()
            model = core.read_model(folder / MODEL_FILE)
            model.reshape([self.micro_batch, height, width, channels])
            self._compiled = core.compile_model(model, "CPU", _options(threads, precision))
            took = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        # Broad: OpenVINO raises RuntimeError for whatever it stumbles on.
        except Exception as error:
            raise EngineError(f"OpenVINO cannot run it: {error}") from error
        if precision == "fp32" and took != openvino.Type.f32:
            raise EngineError(f"OpenVINO would calculate in {took}, not in fp32")
        self._lane = threading.local()

    def enter_lane(self) -> None:
        """See :class:`toolkit.embedding.encoder.Model`."""
        self._lane.request = self._compiled.create_infer_request()

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`toolkit.embedding.encoder.Model`."""
        result = self._lane.request.infer([pixels], share_inputs=True, share_outputs=True)
        # A copy: the next run of this lane writes over it.
        return np.array(result[0], np.float32)


def export(network: torch.nn.Module, how: Preprocessing, folder: Path) -> None:
    """Write a network of torch as a file of OpenVINO.

    Args:
        network: From :func:`toolkit.embedding.torch_model.as_network`.
        how: Its preprocessing.
        folder: An existing one.

    Raises:
        EngineError: If OpenVINO cannot read the network.
        OSError: If it cannot be written.
    """
    channels, height, width = how.input_size
    pixels = np.zeros((2, height, width, channels), np.uint8)
    try:
        model = _converted(network, pixels)
    # Broad: the converter lets out whatever a network makes it stumble on.
    except Exception as error:
        raise EngineError(f"OpenVINO cannot convert it: {error}") from error
    _openvino().save_model(model, folder / MODEL_FILE, compress_to_fp16=False)


def _converted(network: torch.nn.Module, pixels: NDArray[np.uint8]) -> Any:
    import torch

    example = torch.from_numpy(pixels)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        # Not checked here by a second run: who loads it compares its vectors with torch's.
        traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        return _openvino().convert_model(traced, example_input=example)


def _openvino() -> Any:
    # It imports what reports to its makers, if it can: nobody is told of what runs here.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


@functools.cache
def _core() -> Any:
    """The one door to OpenVINO, kept for as long as this process lives.

    Its processor plugin gives the thread that loads it another stack for signals, and unmaps that
    when the last model of the last core is gone. That would be in a lane, which ends after its
    encoder: the other thread would keep a stack that is not there, and the next signal that
    Python handles would kill the process.
    """
    return _openvino().Core()


def _options(threads: int, precision: str) -> dict[str, Any]:
    is_exact = precision == "fp32"
    return {
        "INFERENCE_PRECISION_HINT": "f32" if is_exact else "bf16",
        "EXECUTION_MODE_HINT": "ACCURACY" if is_exact else "PERFORMANCE",
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
        # Two processes would pin their threads to the same processors.
        "ENABLE_CPU_PINNING": False,
    }
