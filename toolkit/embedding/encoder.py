"""Pictures to vectors with torch, as fast as the machine allows.

Law: a vector is what plain timm gives for one picture at a time, to 1e-5 a component. Batch
size, neighbours and threads do not show in it. What makes it fast is checked against the
plain model each time one is loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch.nn.utils.fusion import fuse_conv_bn_weights

from toolkit.embedding.spec import EXACT_TOLERANCE, EncoderRequest, EncoderSpec, SpecCache
from toolkit.embedding.timm_model import (
    data_config,
    make_model,
    obtain_weights,
    output_shape,
    short,
)
from toolkit.embedding.weights import WeightsFile
from toolkit.errors import ModelError, SettingError
from toolkit.images.decode import DECODE_VERSION
from toolkit.machine import usable_cpus

logger = logging.getLogger(__name__)

#: Images that go through the model at once on a processor. Each thread runs the model for
#: itself: threads that share one run wait for each other at every layer, and where something
#: else wants a processor, the decoding to begin with, they wait for it too. Two, because their
#: activations stay in a core's cache: tf_efficientnet_lite0 on 2 cores, best of 40 runs beside
#: other load, 75 images/s at 1, 117 at 2, 95 at 4, 79 at 8.
CPU_MICRO_BATCH = 2

#: The same on an accelerator, where only the number of launches counts; halved out of memory.
ACCELERATOR_MICRO_BATCH = 64

#: A picture longer than this many times its short side is cropped before it is resized: its
#: short side would be blown up to the input's, and its long side with it, to gigabytes.
MAX_ASPECT_RATIO = 100


class Encoder:
    """Pictures to vectors; made by :meth:`load`.

    Attributes:
        spec: What it is; its fingerprint names the vectors.
        golden: Its vectors of the golden pictures, float32 of shape ``(n, dim)``.
        device: A torch device, resolved.
        micro_batch: Images that go through the model at once.
        n_lanes: Runs of the model side by side.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        model: torch.nn.Module,
        device: str,
        threads: int,
        batch_size: int | None = None,
    ) -> None:
        self.spec, self.device = spec, device
        is_cpu = device == "cpu"
        self.golden = np.empty((0, spec.dim), np.float32)
        self.micro_batch = batch_size or (CPU_MICRO_BATCH if is_cpu else ACCELERATOR_MICRO_BATCH)
        self.n_lanes = threads if is_cpu else 1
        # The number of threads is a matter of each thread, too.
        self._lanes = ThreadPoolExecutor(
            self.n_lanes, "encode", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._model = model.to(device)
        how = spec.preprocessing
        self._transform = create_transform(**dataclasses.asdict(how), normalize=False)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (how.mean, how.std)
        )

    @classmethod
    def load(
        cls,
        request: EncoderRequest,
        *,
        data_dir: Path,
        device: str = "auto",
        threads: int | None = None,
        batch_size: int | None = None,
    ) -> Encoder:
        """Make the model, resolve its spec and remember it.

        Sets torch's number of threads for this process.

        Args:
            request: The encoder.
            data_dir: The data folder; weights and resolved specs are kept there.
            device: ``auto``, ``cpu`` or a torch device such as ``cuda:0``.
            threads: Runs of the model side by side on processors; by default as many as
                this process may use.
            batch_size: Images that go through the model at once; by default what the
                device does best.

        Raises:
            ModelError: If timm does not know the model, cannot make it as asked for, or
                the weights are of another one.
            WeightsNotFoundError: If no weights are at hand and the hub gives none.
            SettingError: If there is no such device.
        """
        device, threads = _device(device), threads or usable_cpus()
        torch.set_num_threads(1 if device == "cpu" else threads)
        weights = obtain_weights(request, data_dir)
        model = make_model(request, weights)
        spec = _spec(request, weights, model)
        encoder = cls(
            spec, _fast(model, spec.preprocessing.input_size), device, threads, batch_size
        )
        pictures = np.stack([encoder.prepare(picture) for picture in golden_pictures()])
        encoder.golden = golden = encoder.encode(pictures)
        if not np.isfinite(golden).all():
            raise ModelError(
                f"{request.model} gives vectors that are not finite; use other weights"
            )
        cache = SpecCache(data_dir / "specs")
        encoder.spec = cache.settle(encoder.spec, golden, encoder.device.partition(":")[0])
        cache.put(request, weights, encoder.spec)
        return encoder

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.spec.dim

    @property
    def at_once(self) -> int:
        """Images that :meth:`encode` should be given at once, to keep every lane at work."""
        return self.micro_batch * self.n_lanes

    def prepare(self, rgb: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop one picture; may be called from several threads.

        Args:
            rgb: Upright, of mode ``RGB``.

        Returns:
            What the model looks at, shape ``(3, height, width)``.
        """
        if self.spec.preprocessing.crop_mode == "center":
            rgb = _without_far_ends(rgb)
        pixels: NDArray[np.uint8] = self._transform(rgb).numpy()
        return pixels

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the model.

        Args:
            pixels: From :meth:`prepare`, shape ``(n, 3, height, width)``.

        Returns:
            Shape ``(n, dim)``, each row of length 1. A row is not finite where the model
            gave no vector that has a direction.
        """
        size, nothing = self.micro_batch, np.empty((0, self.dim), np.float32)
        chunks = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        try:
            vectors = np.concatenate([nothing, *self._lanes.map(self._forward, chunks)])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            self.micro_batch = size // 2
            logger.warning("%s is out of memory; now %d at once", self.device, self.micro_batch)
            return self.encode(pixels)
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            rows: NDArray[np.float32] = (vectors / lengths).astype(np.float32)
        return rows

    @torch.inference_mode()
    def _forward(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        # Always the same shape: other shapes take other paths through the libraries, and the
        # bytes of a vector would depend on how many neighbours it has.
        padded = np.zeros((self.micro_batch, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        batch = torch.from_numpy(padded)
        if self.device.startswith("cuda"):
            batch = batch.pin_memory()
        batch = batch.to(self.device, non_blocking=True)
        # The steps of timm's ToTensor and Normalize, in their order, so with their roundings.
        inputs = batch.to(memory_format=torch.channels_last).float().div_(255)
        inputs.sub_(self._mean).div_(self._std)
        out: NDArray[np.float32] = self._model(inputs)[: len(pixels)].float().cpu().numpy()
        return out


def golden_pictures() -> list[Image.Image]:
    """A few pictures that are the same everywhere and for ever."""
    pictures = []
    for n, (width, height) in enumerate([(320, 240), (240, 320), (224, 224), (640, 200)], 1):
        y, x = np.indices((height, width))
        bands = (3 * x + n * y, x * y // (6 + n), (x * x + y * y) // 97)
        pictures.append(Image.fromarray((np.stack(bands, axis=-1) % 256).astype(np.uint8)))
    return pictures


def _without_far_ends(rgb: Image.Image) -> Image.Image:
    """The middle of a picture; all of it unless it is far too long."""
    limit = MAX_ASPECT_RATIO * min(rgb.size)
    if max(rgb.size) <= limit:
        return rgb
    width, height = min(rgb.width, limit), min(rgb.height, limit)
    left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
    return rgb.crop((left, top, left + width, top + height))


def _device(name: str) -> str:
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


def _spec(
    request: EncoderRequest, weights: WeightsFile | None, model: torch.nn.Module
) -> EncoderSpec:
    return EncoderSpec(
        architecture=request.model.partition(".")[0],
        weights_sha256=weights.sha256 if weights else "random",
        preprocessing=data_config(request, model),
        decode_version=DECODE_VERSION,
        decode=request.decode,
        precision=request.precision,
        head=request.head,
        global_pool=request.global_pool,
        seed=None if weights else request.seed or 0,
        dim=output_shape(request, model)[1],
    )


def _fast(model: torch.nn.Module, input_size: tuple[int, int, int]) -> torch.nn.Module:
    """The model with batch norms folded into their convolutions, if that changes nothing."""
    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        return model.to(memory_format=torch.channels_last)
    folded = copy.deepcopy(model)
    _fold_norms(folded)
    noise = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain, fast = (torch.nn.functional.normalize(m(noise)) for m in (model, folded))
    difference = float((plain - fast).abs().max())
    if difference > EXACT_TOLERANCE:
        logger.info("folding batch norms would move a vector by %.1e; they stay", difference)
        folded = model
    return folded.to(memory_format=torch.channels_last)


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
