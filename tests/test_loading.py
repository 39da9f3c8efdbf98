"""Which engine runs a model does not show in its vectors, and torch is not loaded for nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import toolkit
from tests.pictures import texture
from tests.test_catalog import fill, small_disk
from toolkit.embedding import loading, openvino_model
from toolkit.embedding.encoder import Encoder
from toolkit.embedding.exports import is_installed
from toolkit.embedding.loading import load_encoder
from toolkit.embedding.openvino_model import MODEL_FILE, OpenVinoModel
from toolkit.embedding.preprocess import golden_pictures
from toolkit.embedding.spec import LEAST_BF16_COSINE, EncoderRequest, Preprocessing
from toolkit.embedding.weights import packaged_file

pytestmark = pytest.mark.skipif(not is_installed(), reason="the fast extra is not installed")

PHOTOS = Path(toolkit.__file__).parent / "samples" / "photos"
TINY = EncoderRequest("test_vit", pretrained=False)
TINY_BF16 = dataclasses.replace(TINY, precision="bf16")

CODE = """
import json, sys, time
from pathlib import Path
from toolkit.embedding.loading import load_encoder
from toolkit.embedding.spec import EncoderRequest
request = EncoderRequest.from_json(json.loads(sys.argv[1]))
encoder = load_encoder(
    request, data_dir=Path(sys.argv[2]), device="cpu", engine_dir=Path(sys.argv[3]), threads=1
)
has_torch = bool({"torch", "timm"} & set(sys.modules))
print(json.dumps([encoder.model.engine, encoder.spec.fingerprint, has_torch]))
"""


def load(request: EncoderRequest, tmp_path: Path, *, with_engines: bool = True) -> Encoder:
    """In this process, with a data folder that knows nothing."""
    data_dir = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
    folder = tmp_path / "engines" if with_engines else None
    return load_encoder(request, data_dir=data_dir, device="cpu", engine_dir=folder, threads=2)


def load_apart(request: EncoderRequest, tmp_path: Path) -> tuple[str, str, bool]:
    """In a process of its own: engine, fingerprint, whether torch was imported."""
    asked = json.dumps(request.to_json())
    command = [
        sys.executable,
        "-c",
        CODE,
        asked,
        str(tmp_path / "apart"),
        str(tmp_path / "engines"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    engine, fingerprint, has_torch = json.loads(done.stdout)
    return engine, fingerprint, has_torch


def vectors_of(encoder: Encoder) -> NDArray[np.float32]:
    pictures = [*golden_pictures(), texture((300, 70)), texture((40, 500))]
    return encoder.encode(np.stack([encoder.prepare(picture) for picture in pictures]))


def exported(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "engines").glob("*/engine.json"))


@pytest.mark.parametrize(
    "request_",
    [
        TINY,
        EncoderRequest("test_vit", pretrained=False, img_size=96),
        EncoderRequest("test_vit", pretrained=False, global_pool="avg"),
        EncoderRequest("test_resnet", pretrained=False),
        EncoderRequest("test_efficientnet", pretrained=False),
        EncoderRequest("test_nfnet", pretrained=False),
        EncoderRequest("test_convnext", pretrained=False),
    ],
    ids=lambda request: f"{request.model}-{request.img_size}-{request.global_pool}",
)
def test_engines_give_one_encoder(request_: EncoderRequest, tmp_path: Path) -> None:
    plain = load(request_, tmp_path, with_engines=False)
    fast = load(request_, tmp_path)

    assert (plain.model.engine, fast.model.engine) == ("torch", "openvino")
    assert plain.spec == fast.spec
    assert np.abs(vectors_of(plain) - vectors_of(fast)).max() <= 1e-5


@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet"])
def test_neighbours_and_batch_size_do_not_show_in_the_bytes(model: str, tmp_path: Path) -> None:
    encoder = load(EncoderRequest(model, pretrained=False), tmp_path)
    pixels = np.stack([encoder.prepare(texture(seed=n)) for n in range(11)])

    together = encoder.encode(pixels)
    alone = np.concatenate([encoder.encode(pixels[n : n + 1]) for n in range(11)])

    assert encoder.model.engine == "openvino"
    assert together.tobytes() == alone.tobytes()


def test_lanes_do_not_show_in_the_bytes(tmp_path: Path) -> None:
    one, three = (
        load_encoder(TINY, data_dir=tmp_path, device="cpu", engine_dir=tmp_path / "e", threads=n)
        for n in (1, 3)
    )

    assert vectors_of(one).tobytes() == vectors_of(three).tobytes()


@pytest.mark.slow
def test_a_signal_after_an_encoder_is_gone_does_no_harm(tmp_path: Path) -> None:
    # In a process of its own: what is tried may kill it.
    code = CODE + (
        "import os, signal, threading\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "del encoder\n"
        "for thread in threading.enumerate():\n"
        "    if thread.name.startswith('encode'):\n"
        "        thread.join(timeout=30)\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    asked = json.dumps(TINY.to_json())

    done = subprocess.run(
        [sys.executable, "-c", code, asked, str(tmp_path / "data"), str(tmp_path / "engines")],
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout.split()[-1]) == (0, "handled"), done.stderr


@pytest.mark.slow
def test_an_exported_model_needs_no_torch(tmp_path: Path) -> None:
    first = load_apart(TINY, tmp_path)
    second = load_apart(TINY, tmp_path)

    assert first == ("openvino", second[1], True)
    assert second == ("openvino", first[1], False)


def test_another_encoder_is_another_export(tmp_path: Path) -> None:
    others = [EncoderRequest("test_vit", pretrained=False, seed=1), TINY]

    vectors = [vectors_of(load(request, tmp_path)) for request in others]

    assert len(exported(tmp_path)) == 2
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def damage(tmp_path: Path, harm: str) -> None:
    """Do harm to the one export there is."""
    (record,) = exported(tmp_path)
    weights = (record.parent / MODEL_FILE).with_suffix(".bin")
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-100_000])
    elif harm == "other_weights":
        numbers = np.frombuffer(weights.read_bytes()[: weights.stat().st_size // 4 * 4], "<f4")
        weights.write_bytes((numbers * np.float32(1.1)).tobytes())
    elif harm == "gone":
        (record.parent / MODEL_FILE).unlink()
    else:
        record.write_text("{")


@pytest.mark.parametrize("harm", ["cut", "other_weights", "gone", "no_record"])
def test_a_damaged_export_is_not_believed(harm: str, tmp_path: Path) -> None:
    expected = vectors_of(load(TINY, tmp_path))
    damage(tmp_path, harm)

    again = load(TINY, tmp_path)

    assert np.abs(vectors_of(again) - expected).max() <= 1e-5
    # What is damaged was made anew.
    assert again.model.engine == "openvino"


def test_a_full_disk_leaves_the_model_to_torch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        encoder = load_encoder(
            TINY, data_dir=tmp_path / "data", device="cpu", engine_dir=disk / "engines", threads=1
        )

    assert encoder.model.engine == "torch"
    assert "test_vit is not exported, torch runs it" in caplog.text


def test_the_newest_exports_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "KEEP_EXPORTS", 2)
    for seed in range(4):
        load(EncoderRequest("test_vit", pretrained=False, seed=seed), tmp_path)

    assert len(exported(tmp_path)) == 2
    # The last one is among them.
    assert load_apart(EncoderRequest("test_vit", pretrained=False, seed=3), tmp_path)[2] is False


def test_it_calculates_in_fp32_whatever_the_processor_could(tmp_path: Path) -> None:
    encoder = load(TINY, tmp_path)

    assert isinstance(encoder.model, OpenVinoModel)
    (options,) = encoder.model._parts
    assert str(options.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


def test_the_converter_reports_to_nobody(tmp_path: Path) -> None:
    load(TINY, tmp_path)

    assert sys.modules.get("openvino_telemetry") is None


def test_many_processes_export_once(tmp_path: Path) -> None:
    asked = json.dumps(TINY.to_json())
    command = [sys.executable, "-c", CODE, asked, str(tmp_path / "data"), str(tmp_path / "engines")]

    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(3)
    ]
    said = [json.loads(process.communicate(timeout=120)[0]) for process in started]

    assert {engine for engine, _, _ in said} == {"openvino"}
    assert len({fingerprint for _, fingerprint, _ in said}) == 1
    assert len(exported(tmp_path)) == 1
    assert not [p for p in (tmp_path / "engines").iterdir() if p.is_dir() and p.name[0] == "."]


# --- faster, not exact ------------------------------------------------------------------------


def takes_bf16(encoder: Encoder) -> bool:
    """What OpenVINO says that it calculates in."""
    assert isinstance(encoder.model, OpenVinoModel)
    return "bfloat16" in str(encoder.model._parts[-1].get_property("INFERENCE_PRECISION_HINT"))


def processor_has_bf16() -> bool:
    core = openvino_model._openvino().Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_fast_encoders_are_others_and_share_one_export(tmp_path: Path) -> None:
    modes = itertools.product(("fp32", "bf16"), ("full", "reduced"))
    requests = [dataclasses.replace(TINY, precision=p, decode=d) for p, d in modes]

    encoders = [load(request, tmp_path) for request in requests]

    assert len({encoder.spec.fingerprint for encoder in encoders}) == 4
    # In bf16 it may be torch that runs it: OpenVINO refuses some models where the processor
    # has no bf16.
    assert {e.model.engine for e in encoders if e.spec.precision == "fp32"} == {"openvino"}
    for request, encoder in zip(requests, encoders, strict=True):
        assert (encoder.spec.precision, encoder.spec.decode) == (request.precision, request.decode)
    assert len(exported(tmp_path)) == 1


@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet"])
def test_bf16_moves_the_vectors_a_little(model: str, tmp_path: Path) -> None:
    exact = load(EncoderRequest(model, pretrained=False), tmp_path)
    fast = load(EncoderRequest(model, pretrained=False, precision="bf16"), tmp_path)
    before, after = vectors_of(exact), vectors_of(fast)

    assert float((before * after).sum(axis=1).min()) >= LEAST_BF16_COSINE
    assert np.abs(np.linalg.norm(after.astype(np.float64), axis=1) - 1).max() < 1e-6
    if fast.model.engine == "openvino":
        # Processors without bf16 calculate in fp32, or in bf16 by software.
        assert takes_bf16(fast) or not processor_has_bf16()
        assert bool(np.abs(before - after).max() > 1e-5) == takes_bf16(fast)
    else:  # it refuses some models there
        assert not processor_has_bf16()


class _Long(torch.nn.Module):
    """Layers, the last of which looks at the picture again: nowhere does one tensor pass alone."""

    def __init__(self, is_long: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(6))
        self.is_long = is_long

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first = x = pixels.permute(0, 3, 1, 2).float()
        for layer in self.layers:
            x = layer(x).relu()
        return (x + first if self.is_long else x).mean(dim=(2, 3))


@pytest.mark.parametrize(("is_long", "n_parts"), [(False, 2), (True, 1)])
def test_the_first_layers_stay_exact_where_a_model_can_be_cut(
    is_long: bool, n_parts: int, tmp_path: Path
) -> None:
    how = Preprocessing((3, 8, 8), "bicubic", (0.0,) * 3, (1.0,) * 3, 1.0, "center")
    network = _Long(is_long).eval()
    openvino_model.export(network, how, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)

    model = OpenVinoModel(tmp_path, (3, 8, 8), 1, precision="bf16")
    model.enter_lane()

    assert len(model._parts) == n_parts
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(model.run(pixels), expected, rtol=0.02, atol=0.5)
    if n_parts == 2 and processor_has_bf16():
        hints = [str(p.get_property("INFERENCE_PRECISION_HINT")) for p in model._parts]
        assert ["float32" in hints[0], "bfloat16" in hints[1]] == [True, True]


@pytest.mark.slow
@pytest.mark.skipif(packaged_file() is None, reason="the demo extra is not installed")
def test_the_worst_photo_in_bf16_is_close_to_exact(tmp_path: Path) -> None:
    request = EncoderRequest("tf_efficientnet_lite0")
    pictures = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.rglob("*.webp"))]
    exact, fast = (
        load(dataclasses.replace(request, precision=precision), tmp_path)
        for precision in ("fp32", "bf16")
    )
    pixels = np.stack([exact.prepare(picture) for picture in pictures])

    cosines = (exact.encode(pixels).astype(np.float64) * fast.encode(pixels)).sum(axis=1)

    assert len(pictures) > 100
    assert cosines.min() >= 0.999


def test_neighbours_do_not_show_in_the_bytes_of_bf16(tmp_path: Path) -> None:
    encoder = load(TINY_BF16, tmp_path)
    pixels = np.stack([encoder.prepare(texture(seed=n)) for n in range(7)])

    alone = np.concatenate([encoder.encode(pixels[n : n + 1]) for n in range(7)])

    assert encoder.encode(pixels).tobytes() == alone.tobytes()


def test_what_a_fast_encoder_exports_is_exact(tmp_path: Path) -> None:
    load(dataclasses.replace(TINY_BF16, decode="reduced"), tmp_path)
    (record,) = exported(tmp_path)
    written, said = record.stat().st_ino, json.loads(record.read_text())["spec"]

    exact = load(TINY, tmp_path)

    assert exact.model.engine == "openvino"
    assert exact.spec.is_exact
    assert (
        np.abs(vectors_of(exact) - vectors_of(load(TINY, tmp_path, with_engines=False))).max()
        <= 1e-5
    )
    # It was held to exactness when it was made, too.
    assert (said["precision"], said["decode"]) == ("fp32", "full")
    # The same export, not another one.
    assert [path.stat().st_ino for path in exported(tmp_path)] == [written]


def test_where_bf16_is_unfit_torch_runs_it_and_the_export_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(TINY, tmp_path)
    (record,) = exported(tmp_path)
    written = record.stat().st_ino
    # No cosine is that large.
    monkeypatch.setattr(loading, "LEAST_BF16_COSINE", 1.1)

    fast = load(TINY_BF16, tmp_path)

    assert (fast.model.engine, fast.spec.precision) == ("torch", "bf16")
    assert [path.stat().st_ino for path in exported(tmp_path)] == [written]
    assert load(TINY, tmp_path).model.engine == "openvino"


@pytest.mark.parametrize("harm", ["cut", "other_weights", "gone", "no_record"])
def test_a_damaged_export_is_not_believed_by_a_fast_encoder(harm: str, tmp_path: Path) -> None:
    if not processor_has_bf16():
        pytest.skip("without bf16 in the processor torch may run the fast encoder anyway")
    expected = vectors_of(load(TINY_BF16, tmp_path))
    damage(tmp_path, harm)

    again = load(TINY_BF16, tmp_path)

    # What is damaged was made anew.
    assert again.model.engine == "openvino"
    assert np.abs(vectors_of(again) - expected).max() <= 1e-5
    assert load(TINY, tmp_path).model.engine == "openvino"
