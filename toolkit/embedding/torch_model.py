"""A model that torch runs, as fast as it does without another result.

Law: what makes it fast is checked against the plain model each time one is loaded.
"""

from __future__ import annotations

import copy
import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.fusion import fuse_conv_bn_weights

from toolkit.embedding.spec import EXACT_TOLERANCE, Preprocessing
from toolkit.embedding.timm_model import short
from toolkit.errors import SettingError

logger = logging.getLogger(__name__)

#: Images that go through the model at once on a processor. Each thread runs the model for
#: itself: threads that share one run wait for each other at every layer, and where something
#: else wants a processor, the decoding to begin with, they wait for it too. Two, because their
#: activations stay in a core's cache: tf_efficientnet_lite0 on 2 cores, best of 40 runs beside
#: other load, 75 images/s at 1, 117 at 2, 95 at 4, 79 at 8.
CPU_MICRO_BATCH = 2

#: The same on an accelerator, where the number of launches counts: it is tried with each of these
#: when a model is loaded, and halved should memory end later. No batch of a build is longer.
ACCELERATOR_MICRO_BATCHES = (16, 32, 64)


class TorchModel:
    """See :class:`toolkit.embedding.encoder.Model`.

    Args:
        network: From :func:`as_network`.
        device: From :func:`resolved_device`.
        threads: Runs of the model side by side on processors.
        batch_size: Images that go through it at once; by default what the device does best.
        precision: ``fp32``, or ``bf16`` where torch's autocast takes it.
    """

    engine = "torch"

    def __init__(
        self,
        network: torch.nn.Module,
        device: str,
        threads: int,
        batch_size: int | None = None,
        precision: str = "fp32",
    ) -> None:
        is_cpu = device == "cpu"
        self.device = device
        least = CPU_MICRO_BATCH if is_cpu else ACCELERATOR_MICRO_BATCHES[0]
        self.micro_batch = batch_size or least
        self.n_lanes = threads if is_cpu else 1
        torch.set_num_threads(1 if is_cpu else threads)
        self._network = network.to(device)
        self._is_exact = precision == "fp32"

    def enter_lane(self) -> None:
        """See :class:`toolkit.embedding.encoder.Model`."""
        # The number of threads is a matter of each thread, too.
        torch.set_num_threads(1)

    @torch.inference_mode()
    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`toolkit.embedding.encoder.Model`."""
        batch = torch.from_numpy(pixels)
        try:
            if self.device.startswith("cuda"):
                batch = batch.pin_memory()
            kind = self.device.partition(":")[0]
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=not self._is_exact):
                vectors = self._network(batch.to(self.device, non_blocking=True))
            out: NDArray[np.float32] = vectors.float().cpu().numpy()
            return out
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Not from that error: its traceback would keep on the device what did not fit there,
        # and fewer would not fit either.
        raise MemoryError(reason)


class Network(torch.nn.Module):
    """A model that takes pixels as they come: ``(n, height, width, 3)`` of uint8.

    The steps are those of timm's ToTensor and Normalize, in their order, so with their
    roundings.
    """

    def __init__(self, model: torch.nn.Module, how: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.mean = torch.nn.Buffer(torch.tensor(how.mean).view(1, 3, 1, 1))
        self.std = torch.nn.Buffer(torch.tensor(how.std).view(1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Shape ``(n, height, width, 3)`` to ``(n, dim)``."""
        # A view: what lies behind it is in channels_last already.
        inputs = pixels.permute(0, 3, 1, 2).float().div(255)
        out: torch.Tensor = self.model(inputs.sub(self.mean).div(self.std))
        return out


def as_network(model: torch.nn.Module, how: Preprocessing) -> Network:
    """The model from pixels on, made fast where that changes nothing."""
    fast = _fast(model, how.input_size).to(memory_format=torch.channels_last)
    return Network(fast, how).eval()


def resolved_device(name: str) -> str:
    """The torch device that a setting means.

    Raises:
        SettingError: If there is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    # Broad: torch says RuntimeError, AssertionError or NotImplementedError, by the device.
    except Exception as error:
        raise SettingError(
            "device", name, f"'auto', 'cpu' or a device that torch has here ({short(error)})"
        ) from error
    # Off by default for products, on for convolutions: it keeps 10 bits of 23.
    torch.backends.cudnn.allow_tf32 = False
    return name


def _fast(model: torch.nn.Module, input_size: tuple[int, int, int]) -> torch.nn.Module:
    """The model with batch norms folded into their convolutions, if that changes nothing."""
    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        return model
    folded = copy.deepcopy(model)
    _fold_norms(folded)
    noise = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain, fast = (torch.nn.functional.normalize(m(noise)) for m in (model, folded))
    difference = float((plain - fast).abs().max())
    if difference > EXACT_TOLERANCE:
        logger.info("folding batch norms would move a vector by %.1e; they stay", difference)
        return model
    return folded


def _fold_norms(model: torch.nn.Module) -> None:
    for module in list(model.modules()):
        before: torch.nn.Module | None = None
        for name, norm in list(module.named_children()):
            # Neighbours in the list need not follow each other in the flow: the caller checks.
            if (
                isinstance(before, torch.nn.Conv2d)
                and isinstance(norm, torch.nn.BatchNorm2d)
                and norm.running_mean is not None
                and norm.running_var is not None
                and norm.num_features == before.out_channels
            ):
                before.weight, before.bias = fuse_conv_bn_weights(
                    before.weight,
                    before.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                )
                # timm's norm may bring its activation along.
                setattr(module, name, torch.nn.Sequential(*norm.children()))
            before = norm
