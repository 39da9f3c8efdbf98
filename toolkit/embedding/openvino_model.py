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

#: Of the layers with weights, the first ones that stay in fp32 when the rest runs in bf16, as a
#: share: what the first layers lose, all others carry along. tf_efficientnet_lite0 on 2 cores, 760
#: photos, the least cosine to exact vectors and images/s: .9912 and 720 with none of them, .9992
#: and 531 with 0.12, .9996 and 495 with 0.3; all in fp32 392.
FP32_SHARE = 0.12

#: Beyond this share nothing would be left to be gained.
MOST_FP32_SHARE = 0.6

# What has weights, by the names that OpenVINO gives its operations.
_LAYERS = ("Convolution", "GroupConvolution", "MatMul")

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
        precision: ``fp32``, or ``bf16``, for which a processor without it takes fp32; the first
            layers are in fp32 all the same.

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
            model = _core().read_model(folder / MODEL_FILE)
            model.reshape([self.micro_batch, height, width, channels])
            if precision == "fp32":
                self._parts = [_compiled(model, threads, precision)]
                took = self._parts[0].get_property("INFERENCE_PRECISION_HINT")
            else:
                self._parts = _in_bf16(model, threads)
        # Broad: OpenVINO raises RuntimeError for whatever it stumbles on.
        except Exception as error:
            raise EngineError(f"OpenVINO cannot run it: {error}") from error
        if precision == "fp32" and took != openvino.Type.f32:
            raise EngineError(f"OpenVINO would calculate in {took}, not in fp32")
        self._lane = threading.local()

    def enter_lane(self) -> None:
        """See :class:`toolkit.embedding.encoder.Model`."""
        self._lane.requests = [part.create_infer_request() for part in self._parts]

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`toolkit.embedding.encoder.Model`."""
        values: Any = pixels
        for request in self._lane.requests:
            values = request.infer([values], share_inputs=True, share_outputs=True)[0]
        # A copy: the next run of this lane writes over it.
        return np.array(values, np.float32)


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


def _in_bf16(model: Any, threads: int) -> list[Any]:
    """A model in one or two parts that follow each other: the first in fp32, the rest in bf16."""
    cut = _cut(model)
    if cut is None:
        return [_compiled(model, threads, "bf16")]
    openvino, output = _openvino(), cut.output(0)
    first = _compiled(openvino.Model([output], model.get_parameters()), threads, "fp32")
    given = openvino.op.Parameter(output.get_element_type(), output.get_partial_shape())
    for target in list(output.get_target_inputs()):
        target.replace_source_output(given.output(0))
    rest = openvino.Model(model.get_results(), [given])
    return [first, _compiled(rest, threads, "bf16")]


def _cut(model: Any) -> Any:
    """Where a model falls into two parts of which one tensor passes to the other; or ``None``.

    The first such place behind :data:`FP32_SHARE` of the layers.
    """
    operations = model.get_ordered_ops()
    number = {operation.get_friendly_name(): n for n, operation in enumerate(operations)}
    last_use, is_data, n_layers = [0] * len(operations), [False] * len(operations), 0
    total = sum(operation.get_type_name() in _LAYERS for operation in operations)
    in_use: set[int] = set()
    for n, operation in enumerate(operations):
        # What depends on no input, weights above all, belongs to whoever uses it.
        sources = [
            number[i.get_source_output().get_node().get_friendly_name()] for i in operation.inputs()
        ]
        is_data[n] = operation.get_type_name() == "Parameter" or any(is_data[s] for s in sources)
        n_layers += operation.get_type_name() in _LAYERS
        if not is_data[n]:
            continue
        last_use[n] = max(
            (
                number[target.get_node().get_friendly_name()]
                for output in operation.outputs()
                for target in output.get_target_inputs()
            ),
            default=0,
        )
        in_use = {m for m in in_use | {n} if last_use[m] > n}
        if n_layers > MOST_FP32_SHARE * total:
            return None
        if n_layers >= FP32_SHARE * total and in_use == {n} and operation.get_output_size() == 1:
            return operation
    return None


def _compiled(model: Any, threads: int, precision: str) -> Any:
    return _core().compile_model(model, "CPU", _options(threads, precision))


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
