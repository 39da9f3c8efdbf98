"""What an encoder is: the request for one, its resolved spec, and its fingerprint.

Law: no torch here. A spec holds everything that changes a vector and nothing else: no paths,
no library versions, no engine. Two vectors may be compared only under one fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ModelError, SettingError
from toolkit.images.decode import DECODE_VERSION

if TYPE_CHECKING:
    from toolkit.embedding.weights import WeightsFile

#: Largest difference of a component between two runs of one encoder on processors.
EXACT_TOLERANCE = 1e-5

#: Least cosine between two runs of one encoder where an accelerator takes part.
LEAST_COSINE = 0.9999

#: Least cosine to exact vectors that arithmetic in bf16 may leave; below, something is broken.
LEAST_BF16_COSINE = 0.9

#: Architecture of vectors whose encoder nobody named.
IMPORTED = "imported"

_ALLOWED = {
    "head": ("features", "projection"),
    "precision": ("fp32", "bf16"),
    "decode": ("full", "reduced"),
}


@dataclass(frozen=True, slots=True)
class EncoderRequest:
    """An encoder as the user asked for it; :class:`EncoderSpec` is what came of it.

    Attributes:
        model: timm name, with or without a tag: ``vit_base_patch16_224.augreg_in21k``.
        pretrained: ``False`` asks for random weights.
        checkpoint_path: Weights to use instead of the model's own: a file, or a folder with
            ``config.json`` and ``model.safetensors`` as timm writes it.
        img_size: Edge of the square input in pixels; ``None`` is what the weights were made for.
        global_pool: Another pooling than the model's own, by timm's name.
        head: ``features``, or ``projection`` for a CLIP tower with its projection.
        precision: Arithmetic of the model: ``fp32``, or ``bf16``, which is faster and moves
            the vectors.
        decode: Way from bytes to pixels: ``full``, or ``reduced``, which decodes a JPEG at a
            half, a quarter or an eighth of its size where the model looks at no more.
        seed: Of random weights only; ``None`` is 0.
    """

    model: str
    pretrained: bool = True
    checkpoint_path: str | None = None
    img_size: int | None = None
    global_pool: str | None = None
    head: str = "features"
    precision: str = "fp32"
    decode: str = "full"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                words = " or ".join(repr(value) for value in allowed)
                raise SettingError(name, getattr(self, name), words)
        if self.img_size is not None and self.img_size < 1:
            raise SettingError("img_size", self.img_size, "a whole number of pixels above 0")
        # It becomes a folder name, and a path or a hub address would be another kind of thing.
        if not re.fullmatch(r"\w[\w.\-]*", self.model):
            raise ModelError(
                f"{self.model!r} is no name of a timm model; give one such as "
                "'vit_base_patch16_224', and weights of your own with checkpoint_path="
            )

    @property
    def exact(self) -> EncoderRequest:
        """The same encoder without what makes it faster and moves its vectors."""
        return dataclasses.replace(self, precision="fp32", decode="full")

    @property
    def has_weights(self) -> bool:
        """Whether weights are loaded; otherwise they are random."""
        return self.pretrained or self.checkpoint_path is not None

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EncoderRequest:
        """Read back :meth:`to_json`."""
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From an upright RGB picture to the model's input, in timm's words.

    Attributes:
        input_size: Channels, height and width.
        interpolation: Filter of the resize.
        mean: Of each channel, subtracted from values in ``[0, 1]``.
        std: Of each channel, divided by after that.
        crop_pct: Edge of the crop as a share of the resized picture's.
        crop_mode: ``center``, ``squash`` or ``border``.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocessing:
        """From the JSON form or from timm's data config; lists become tuples."""
        _, height, width = value["input_size"]
        return cls(
            (3, int(height), int(width)),
            str(value["interpolation"]),
            tuple(float(x) for x in value["mean"]),
            tuple(float(x) for x in value["std"]),
            float(value["crop_pct"]),
            str(value["crop_mode"]),
        )


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Everything that changes a vector, and nothing else.

    Attributes:
        architecture: timm name without its tag.
        weights_sha256: Of the file of weights, or ``random``.
        preprocessing: From a picture to the model's input.
        decode_version: Version of the recipe from bytes to pixels.
        decode: Way from bytes to pixels.
        precision: Arithmetic of the model.
        head: ``features`` or ``projection``.
        global_pool: Pooling when it is not the model's own.
        seed: Of random weights.
        dim: Length of a vector.
        revision: Counts up when other library versions give other vectors.
    """

    architecture: str
    weights_sha256: str
    preprocessing: Preprocessing
    decode_version: int
    decode: str
    precision: str
    head: str
    global_pool: str | None
    seed: int | None
    dim: int
    revision: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether its vectors are those of plain timm."""
        return (self.precision, self.decode) == ("fp32", "full")

    @classmethod
    def imported(cls, dim: int, source: str) -> EncoderSpec:
        """The spec of vectors that another program made, by an encoder nobody named.

        Args:
            dim: Length of a vector.
            source: Whatever tells one such set of vectors from another.
        """
        unknown = Preprocessing((3, 0, 0), "", (), (), 0.0, "")
        return cls(IMPORTED, source, unknown, 0, "", "", "", None, None, dim)

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON form, in hex: the identity of the encoder."""
        return _digest(self.to_json())

    def describe(self) -> str:
        """What its vectors are, in words for a person."""
        words = f"{self.dim}-d vectors of {self.architecture}"
        if self.head == "projection":
            words += " with its projection head"
        if self.weights_sha256 == "random":
            words += " with random weights"
        fast = [self.precision] * (self.precision == "bf16") + ["reduced decoding"] * (
            self.decode == "reduced"
        )
        return words + (f", not exact: {' and '.join(fast)}" if fast else "")

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EncoderSpec:
        """Read back :meth:`to_json`."""
        return cls(**{**value, "preprocessing": Preprocessing.from_json(value["preprocessing"])})


class SpecCache:
    """Resolved specs on disk, so that a build with nothing to embed loads no torch.

    Args:
        folder: Made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, request: EncoderRequest, weights: WeightsFile | None) -> EncoderSpec | None:
        """What this request came to, with these weights and the libraries as installed.

        Args:
            request: What was asked for.
            weights: What :func:`toolkit.embedding.weights.find_weights` finds for it.

        Returns:
            ``None`` when only the model itself can tell.
        """
        if request.has_weights and weights is None:
            return None
        found = read_json(self._place(request, weights))
        return EncoderSpec.from_json(found) if found else None

    def put(self, request: EncoderRequest, weights: WeightsFile | None, spec: EncoderSpec) -> None:
        """Remember what a request came to."""
        write_json(self._place(request, weights), spec.to_json())

    def settle(self, spec: EncoderSpec, golden: NDArray[np.float32], device: str) -> EncoderSpec:
        """The revision of ``spec`` whose vectors on record are these; a new one if none is.

        So vectors from before and after a library's change of mind never meet.

        Args:
            spec: At revision 0.
            golden: Vectors of the golden pictures, shape ``(n, dim)``.
            device: Where they were made; processors must agree to :data:`EXACT_TOLERANCE`,
                accelerators to :data:`LEAST_COSINE`.
        """
        for revision in itertools.count():
            candidate = dataclasses.replace(spec, revision=revision)
            known = self.golden(candidate)
            if known is None:
                record = {"device": device, "vectors": golden.tolist()}
                write_json(self._golden_place(candidate), record)
                return candidate
            if agree(known[0], golden, {device, known[1]}):
                return candidate
        raise AssertionError("count() does not end")

    def golden(self, spec: EncoderSpec) -> tuple[NDArray[np.float32], str] | None:
        """The vectors of the golden pictures that settled a spec, and the device they are from."""
        record = read_json(self._golden_place(spec))
        if not record:
            return None
        return np.array(record["vectors"], np.float32), str(record["device"])

    def _golden_place(self, spec: EncoderSpec) -> Path:
        return self._folder / f"golden-{spec.fingerprint}.json"

    def _place(self, request: EncoderRequest, weights: WeightsFile | None) -> Path:
        question = {
            "request": request.to_json(),
            "weights": weights.identity if weights else None,
            "versions": [version_of("timm"), version_of("torch")],
            "decode_version": DECODE_VERSION,
        }
        return self._folder / f"{_digest(question)}.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; empty when there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Put a JSON object on disk; a reader sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(temporary, path)


def agree(a: NDArray[np.float32], b: NDArray[np.float32], devices: set[str]) -> bool:
    """Whether two sets of vectors are those of one encoder.

    Args:
        a: Vectors of length 1, shape ``(n, dim)``.
        b: The same pictures' vectors.
        devices: Kinds of device that made them: processors must agree to
            :data:`EXACT_TOLERANCE` a component, accelerators to :data:`LEAST_COSINE`.
    """
    if a.shape != b.shape or not np.isfinite(b).all():
        return False
    if devices == {"cpu"}:
        return float(np.abs(a - b).max()) <= EXACT_TOLERANCE
    return float((a.astype(np.float64) * b).sum(axis=1).min()) >= LEAST_COSINE


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def version_of(package: str) -> str | None:
    """The installed version of a package, which is not imported for it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
