"""What a model looks at is what timm shows it, pixel for pixel, and no torch prepares it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data.transforms_factory import create_transform

from tests.pictures import texture
from toolkit.embedding.preprocess import prepare
from toolkit.embedding.spec import Preprocessing
from toolkit.images import resample


@pytest.fixture(params=["pillow", "numba"], autouse=True)
def _resized_by(
    request: pytest.FixtureRequest, _engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.param == "pillow":
        monkeypatch.setattr(resample, "_kernels", None)
    elif not resample.load(_engines / "kernels"):
        pytest.skip("numba is not here")


#: Wide, high, square, of the input's own size, smaller than it, and of one pixel.
SIZES = [
    (640, 480),
    (333, 500),
    (300, 300),
    (224, 224),
    (256, 257),
    (223, 225),
    (97, 31),
    (20, 1500),
    (1, 1),
]


def with_timm(rgb: Image.Image, how: Preprocessing) -> Any:
    transform: Any = create_transform(**dataclasses.asdict(how), normalize=False)
    return transform(rgb).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("input_size", "interpolation", "crop_pct"),
    [
        ((3, 224, 224), "bicubic", 0.875),
        ((3, 224, 224), "bilinear", 1.0),
        ((3, 96, 160), "bicubic", 0.9),
        ((3, 101, 101), "lanczos", 0.77),
        ((3, 64, 64), "nearest", 0.95),
    ],
    ids=str,
)
def test_pixels_are_those_of_timm(
    size: tuple[int, int],
    crop_mode: str,
    input_size: tuple[int, int, int],
    interpolation: str,
    crop_pct: float,
) -> None:
    mean = (0.485, 0.456, 0.406)
    how = Preprocessing(input_size, interpolation, mean, (0.2,) * 3, crop_pct, crop_mode)
    picture = texture(size)

    pixels = prepare(picture, how)

    assert (pixels.shape, pixels.dtype) == ((*input_size[1:], 3), np.uint8)
    assert np.array_equal(pixels, with_timm(picture, how))
    assert np.array_equal(prepare(np.asarray(picture), how), pixels)


def test_every_model_of_timm_is_prepared_as_timm_does_it() -> None:
    known = {
        dataclasses.astuple(
            Preprocessing.from_json(timm.data.resolve_data_config(pretrained_cfg=c))
        )
        for name in timm.list_pretrained()
        if (c := timm.get_pretrained_cfg(name, allow_unregistered=False).to_dict())
    }
    picture = texture((90, 70))

    wrong = [
        how
        for how in (Preprocessing(*values) for values in sorted(known))
        if not np.array_equal(prepare(picture, how), with_timm(picture, how))
    ]

    assert len(known) > 50
    assert wrong == []


def test_no_torch_prepares_a_picture() -> None:
    code = (
        "import sys; from toolkit.embedding import encoder, loading, preprocess, runner\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'openvino', 'numba'} & set(sys.modules)))"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert said.stdout.strip() == "[]"
