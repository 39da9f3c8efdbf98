"""Vectors are those of plain timm, whatever the batch, its neighbours and the threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

import toolkit
from tests.pictures import texture
from toolkit.embedding.encoder import Encoder
from toolkit.embedding.loading import load_encoder
from toolkit.embedding.preprocess import golden_pictures
from toolkit.embedding.spec import EncoderRequest, SpecCache
from toolkit.embedding.torch_model import _fast
from toolkit.embedding.weights import PACKAGED_MODEL, find_weights, packaged_file
from toolkit.errors import ModelError, SettingError

PHOTOS = Path(toolkit.__file__).parent / "samples" / "photos"
TINY = EncoderRequest("test_vit", pretrained=False)

needs_packaged_weights = pytest.mark.skipif(
    packaged_file() is None, reason="the demo extra is not installed"
)


def load(request: EncoderRequest, data_dir: Path, threads: int = 2) -> Encoder:
    return load_encoder(request, data_dir=data_dir, device="cpu", threads=threads)


def prepared(encoder: Encoder, pictures: list[Image.Image]) -> NDArray[np.uint8]:
    return np.stack([encoder.prepare(picture) for picture in pictures])


def by_hand(
    model: torch.nn.Module, pictures: list[Image.Image], img_size: int | None = None
) -> NDArray[np.float32]:
    """What timm's documentation says to do, one picture at a time."""
    model.eval()
    # timm has no types for this one.
    config = resolve_data_config({"img_size": img_size}, model=model)  # type: ignore[no-untyped-call]
    transform: Any = create_transform(**config, is_training=False)
    with torch.inference_mode():
        rows = [model(transform(picture).unsqueeze(0)) for picture in pictures]
        out: NDArray[np.float32] = torch.nn.functional.normalize(torch.cat(rows)).numpy()
    return out


def plain_random(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(name, num_classes=0, **options)
    return model


def farthest(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load(TINY, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which the packaged weights are converted once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def lite0(data_dir: Path) -> Encoder:
    return load(EncoderRequest(PACKAGED_MODEL), data_dir)


def test_rows_have_length_one(tiny: Encoder) -> None:
    vectors = tiny.encode(prepared(tiny, golden_pictures()))

    assert vectors.shape == (4, tiny.dim) == (4, 64)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() < 1e-6


def test_no_pictures_give_no_rows(tiny: Encoder) -> None:
    assert tiny.encode(np.empty((0, 160, 160, 3), np.uint8)).shape == (0, 64)


@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet"])
def test_neighbours_and_batch_size_do_not_show_in_the_bytes(model: str, tmp_path: Path) -> None:
    encoder = load(EncoderRequest(model, pretrained=False), tmp_path)
    pixels = prepared(encoder, [texture(seed=n) for n in range(7)])

    together = encoder.encode(pixels)
    alone = np.concatenate([encoder.encode(pixels[n : n + 1]) for n in range(7)])
    backwards = encoder.encode(pixels[::-1].copy())[::-1]

    assert together.tobytes() == alone.tobytes() == backwards.copy().tobytes()


def test_threads_do_not_show_in_the_vectors(tiny: Encoder, tmp_path: Path) -> None:
    one = load(TINY, tmp_path, threads=1)
    pixels = prepared(tiny, golden_pictures())

    assert farthest(one.encode(pixels), tiny.encode(pixels)) <= 1e-5


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (TINY, {}),
        (EncoderRequest("test_vit", pretrained=False, img_size=96), {"img_size": 96}),
        (EncoderRequest("test_vit", pretrained=False, global_pool="avg"), {"global_pool": "avg"}),
        (EncoderRequest("test_resnet", pretrained=False), {}),
        # A convolutional model has no argument img_size and takes any.
        (EncoderRequest("test_resnet", pretrained=False, img_size=96), {}),
        (EncoderRequest("test_efficientnet", pretrained=False), {}),
        # Its convolutions standardise their weights: nothing may be folded into them.
        (EncoderRequest("test_nfnet", pretrained=False), {}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else f"{value.model}-{value.img_size}",
)
def test_equal_to_plain_timm(
    request_: EncoderRequest, options: dict[str, Any], tmp_path: Path
) -> None:
    pictures = [*golden_pictures(), texture((300, 70))]
    expected = by_hand(plain_random(request_.model, **options), pictures, request_.img_size)
    encoder = load(request_, tmp_path)

    vectors = encoder.encode(prepared(encoder, pictures))

    assert farthest(vectors, expected) <= 1e-5


class _ConvThenNorm(torch.nn.Module):
    """Holds a convolution and a batch norm that divides by 2 and adds 1."""

    def __init__(self, is_norm_first: bool) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)
        self.norm = torch.nn.BatchNorm2d(3, eps=0.0)
        assert self.norm.running_var is not None
        self.norm.running_var.fill_(4)
        self.norm.bias.data.fill_(1)
        self.is_norm_first = is_norm_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (
            self.conv(self.norm(x)) if self.is_norm_first else self.norm(self.conv(x))
        )
        return out.flatten(1)


@pytest.mark.parametrize("is_norm_first", [False, True])
@torch.inference_mode()
def test_a_batch_norm_is_folded_only_where_it_follows(is_norm_first: bool) -> None:
    plain = _ConvThenNorm(is_norm_first).eval()
    pictures = torch.rand(2, 3, 4, 4)
    expected = plain(pictures)

    fast = _fast(plain, (3, 4, 4))

    n_norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())
    assert n_norms == int(is_norm_first)
    assert torch.allclose(fast(pictures), expected, atol=1e-6)


def test_no_batch_norm_of_an_efficientnet_is_left_to_compute() -> None:
    model = timm.create_model("test_efficientnet", num_classes=0).eval()

    fast = _fast(model, (3, 64, 64))

    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())


def test_the_seed_of_random_weights_is_part_of_the_encoder(tiny: Encoder, tmp_path: Path) -> None:
    other = load(EncoderRequest("test_vit", pretrained=False, seed=1), tmp_path)
    same = load(EncoderRequest("test_vit", pretrained=False, seed=0), tmp_path)
    pixels = prepared(tiny, golden_pictures())

    assert other.spec.fingerprint != tiny.spec.fingerprint == same.spec.fingerprint
    assert farthest(other.encode(pixels), tiny.encode(pixels)) > 0.01


def test_loading_leaves_the_random_numbers_of_the_user_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    load(TINY, tmp_path)

    assert torch.rand(1) == expected


def test_a_loaded_encoder_is_known_from_then_on(tmp_path: Path) -> None:
    encoder = load(TINY, tmp_path)

    assert SpecCache(tmp_path / "specs").get(TINY, None) == encoder.spec


def test_a_very_long_picture_takes_no_more_memory_than_others(tiny: Encoder) -> None:
    # Resized whole, its short side to the input's, it would take 170 GB.
    pixels = tiny.prepare(Image.new("RGB", (2_000_000, 1), (255, 0, 0)))

    assert pixels.shape == (160, 160, 3)
    assert pixels[..., 0].min() == 255
    assert pixels[..., 1:].max() == 0


def test_an_unknown_model_is_refused_with_its_likes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="resnet18"):
        load(EncoderRequest("resnett18"), tmp_path)


def test_an_unknown_device_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="abacus:0"):
        load_encoder(TINY, data_dir=tmp_path, device="abacus:0")


def test_what_a_model_does_not_take_is_refused(tmp_path: Path) -> None:
    # 100 is no multiple of the patches' 16.
    with pytest.raises(ModelError, match="'img_size': 100"):
        load(EncoderRequest("test_vit", pretrained=False, img_size=100), tmp_path)
    with pytest.raises(ModelError, match="not one vector"):
        load(EncoderRequest("test_vit", pretrained=False, global_pool=""), tmp_path)


def test_a_classifier_is_no_projection(tmp_path: Path) -> None:
    # The default tag of this tower was tuned to classes after it was one.
    for model in ("test_vit", "vit_base_patch32_clip_224"):
        with pytest.raises(ModelError, match="no projection head"):
            load(EncoderRequest(model, pretrained=False, head="projection"), tmp_path)


@pytest.mark.slow
def test_no_hub_is_found_out_within_seconds(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from toolkit.embedding.loading import load_encoder\n"
        "from toolkit.embedding.spec import EncoderRequest\n"
        "from toolkit.errors import WeightsNotFoundError\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    load_encoder(EncoderRequest('resnet18'), data_dir=Path(sys.argv[1]), device='cpu')\n"
        "except WeightsNotFoundError as error:\n"
        "    print(f'{time.monotonic() - began:.1f} {error}')"
    )
    # The hub at a port where nobody listens, and a cache that holds nothing.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}

    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    seconds, words = out.split(maxsplit=1)

    assert float(seconds) < 10
    assert "timm/resnet18" in words
    assert "`toolkit model pull resnet18`" in words


@pytest.mark.slow
def test_what_the_hub_gave_before_needs_no_hub(tmp_path: Path) -> None:
    # The hub's cache as its client leaves it.
    repo = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    folder = folder_of_weights(repo / "snapshots" / ("a" * 40), "test_vit")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    code = (
        "import sys; from pathlib import Path\n"
        "from toolkit.embedding.loading import load_encoder\n"
        "from toolkit.embedding.spec import EncoderRequest\n"
        "encoder = load_encoder(EncoderRequest('test_vit'), data_dir=Path(sys.argv[1]))\n"
        "print(encoder.spec.fingerprint)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}

    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    request = EncoderRequest("test_vit")
    found = find_weights(request, tmp_path / "data")

    assert found is not None
    assert found.path == folder / "model.safetensors"
    known = SpecCache(tmp_path / "data" / "specs").get(request, found)
    assert known is not None
    assert known.fingerprint == out.strip()


def folder_of_weights(folder: Path, name: str, **config: Any) -> Path:
    """What timm's ``save_for_hf`` leaves, without its hub."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=config.get("num_classes", 1000))
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name, **config}))
    return folder


def test_a_checkpoint_folder_is_what_timm_reads_from_it(tmp_path: Path) -> None:
    config = {"input_size": [3, 160, 160], "mean": [0.1] * 3, "crop_pct": 0.8}
    config |= {"num_classes": 5, "classifier": "head"}
    folder = folder_of_weights(tmp_path / "mine", "test_vit", num_classes=5, pretrained_cfg=config)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)

    encoder = load(EncoderRequest("test_vit", checkpoint_path=str(folder)), tmp_path / "data")
    vectors = encoder.encode(prepared(encoder, golden_pictures()))

    assert encoder.spec.preprocessing.mean == (0.1,) * 3
    assert encoder.spec.preprocessing.crop_pct == 0.8
    assert farthest(vectors, by_hand(plain, golden_pictures())) <= 1e-5


def test_a_file_of_weights_alone_gives_the_same_encoder_wherever_it_lies(tmp_path: Path) -> None:
    folder = folder_of_weights(tmp_path / "mine", "test_vit")
    (folder / "config.json").unlink()
    other = tmp_path / "elsewhere.safetensors"
    shutil.copy(folder / "model.safetensors", other)

    here, there = (
        load(EncoderRequest("test_vit", checkpoint_path=str(path)), tmp_path / "data").spec
        for path in (folder / "model.safetensors", other)
    )

    assert here.fingerprint == there.fingerprint


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_weights_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    state = dict(timm.create_model("test_vit").state_dict())
    if change == "missing":
        del state["blocks.0.mlp.fc1.weight"]
    elif change == "unexpected":
        state["blocks.99.mlp.fc1.weight"] = torch.zeros(1)
    else:
        state["blocks.0.mlp.fc1.weight"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "w.safetensors")
    request = EncoderRequest("test_vit", checkpoint_path=str(tmp_path / "w.safetensors"))

    with pytest.raises(ModelError, match=r"w\.safetensors.*mlp\.fc1\.weight"):
        load(request, tmp_path / "data")


@pytest.mark.slow
@needs_packaged_weights
def test_every_sample_photo_is_as_in_plain_timm(lite0: Encoder, data_dir: Path) -> None:
    pictures = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.rglob("*.webp"))[::5]]
    folder = data_dir / "weights" / PACKAGED_MODEL
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)

    vectors = lite0.encode(prepared(lite0, pictures))
    expected = by_hand(plain, pictures)

    assert len(pictures) > 10
    assert farthest(vectors, expected) <= 1e-5
    assert (vectors.astype(np.float64) * expected).sum(axis=1).min() >= 0.99999


@pytest.mark.slow
@needs_packaged_weights
def test_the_packaged_weights_know_their_animals(lite0: Encoder, data_dir: Path) -> None:
    folder = data_dir / "weights" / PACKAGED_MODEL
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    # Their numbers among the classes of ImageNet.
    animals = {"panda": 388, "koala": 105, "jaguar": 290, "polar_bear": 296}
    pictures = [Image.open(PHOTOS / "animals" / f"{name}.webp").convert("RGB") for name in animals]

    classes = by_hand(model, pictures).argmax(axis=1)

    assert dict(zip(animals, classes.tolist(), strict=True)) == animals


@pytest.mark.slow
@needs_packaged_weights
def test_the_panda_keeps_its_vector(lite0: Encoder) -> None:
    # From plain timm 1.0.31 and torch 2.14.1. Loaded as efficientnet_lite0, which the weights
    # fit without a complaint, the panda has cosine .926 to this and most components differ.
    picture = Image.open(PHOTOS / "animals" / "panda.webp").convert("RGB")

    (vector,) = lite0.encode(prepared(lite0, [picture]))

    assert int(vector.argmax()) == 896
    assert vector[[0, 1, 3, 896]] == pytest.approx(
        [0.005292, 0.009440, 0.105972, 0.195664], abs=2e-6
    )


@pytest.mark.slow
@needs_packaged_weights
def test_tf_weights_are_refused_by_the_model_of_almost_that_name(
    lite0: Encoder, data_dir: Path
) -> None:
    weights = find_weights(EncoderRequest(PACKAGED_MODEL), data_dir)
    assert weights is not None

    for path in (weights.path, weights.path.parent):
        request = EncoderRequest("efficientnet_lite0", checkpoint_path=str(path))
        with pytest.raises(ModelError, match="tf_efficientnet_lite0"):
            load(request, data_dir)


@pytest.mark.slow
@needs_packaged_weights
def test_converted_weights_are_the_same_encoder_the_second_time(
    lite0: Encoder, data_dir: Path
) -> None:
    request = EncoderRequest(PACKAGED_MODEL)

    known = SpecCache(data_dir / "specs").get(request, find_weights(request, data_dir))

    assert known == lite0.spec
    assert load(request, data_dir).spec == lite0.spec


@pytest.mark.slow
@pytest.mark.parametrize(("head", "dim"), [("features", 768), ("projection", 512)])
def test_the_heads_of_a_clip_tower(head: str, dim: int, tmp_path: Path) -> None:
    name = "vit_base_patch32_clip_224.openai"
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 0} if head == "features" else {}
    expected = by_hand(timm.create_model(name, **options), golden_pictures())

    encoder = load(EncoderRequest(name, pretrained=False, head=head), tmp_path)
    vectors = encoder.encode(prepared(encoder, golden_pictures()))

    assert encoder.dim == dim
    assert encoder.spec.architecture == "vit_base_patch32_clip_224"
    assert farthest(vectors, expected) <= 1e-5
