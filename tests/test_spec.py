"""Which encoder it is: the request, the fingerprint, the cache of resolved specs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.embedding.spec import EncoderRequest, EncoderSpec, Preprocessing, SpecCache
from toolkit.embedding.weights import find_weights, packaged_file, timm_names
from toolkit.errors import ModelError, SettingError, WeightsNotFoundError

PREPROCESSING = Preprocessing((3, 224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3, 0.875, "center")
SPEC = EncoderSpec(
    "resnet18", "ab" * 32, PREPROCESSING, 1, "full", "fp32", "features", None, None, 2
)
GOLDEN = np.array([[0.6, 0.8], [1.0, 0.0]], np.float32)

# One other value for each thing that changes a vector.
OTHERS: dict[str, Any] = {
    "architecture": "resnet34",
    "weights_sha256": "cd" * 32,
    "preprocessing": dataclasses.replace(PREPROCESSING, crop_pct=0.9),
    "decode_version": 2,
    "decode": "draft",
    "precision": "bf16",
    "head": "projection",
    "global_pool": "max",
    "seed": 1,
    "dim": 3,
    "revision": 1,
}


def a_file_of_weights(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def test_every_part_of_a_spec_changes_the_fingerprint() -> None:
    variants = [dataclasses.replace(SPEC, **{name: value}) for name, value in OTHERS.items()]

    fingerprints = {SPEC.fingerprint, *(variant.fingerprint for variant in variants)}

    assert set(OTHERS) == {field.name for field in dataclasses.fields(EncoderSpec)}
    assert len(fingerprints) == 1 + len(OTHERS)


def test_every_part_of_the_preprocessing_changes_the_fingerprint() -> None:
    others = Preprocessing((3, 225, 224), "bilinear", (0.4,) * 3, (0.4,) * 3, 0.9, "squash")
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    variants = [
        dataclasses.replace(PREPROCESSING, **{name: getattr(others, name)}) for name in names
    ]

    specs = [dataclasses.replace(SPEC, preprocessing=variant) for variant in variants]

    assert len({SPEC.fingerprint, *(spec.fingerprint for spec in specs)}) == 1 + len(names)


def test_a_fingerprint_survives_the_trip_through_json() -> None:
    text = json.dumps(SPEC.to_json())

    back = EncoderSpec.from_json(json.loads(text))

    assert back == SPEC
    assert back.fingerprint == SPEC.fingerprint


def test_the_fingerprint_of_a_spec_is_the_same_for_ever() -> None:
    # Computed once; another value here would orphan every vector that is stored.
    expected = "dd9ae25efd75a9e9b7c937699127f5ffde0786a3e48af1a789289d80f311c766"

    assert SPEC.fingerprint == expected


def test_a_request_survives_the_trip_through_json() -> None:
    request = EncoderRequest("test_vit", pretrained=False, img_size=192, seed=3)

    back = EncoderRequest.from_json(json.loads(json.dumps(request.to_json())))

    assert back == request


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("head", "logits", "'features' or 'projection'"),
        ("precision", "fp16", "'fp32' or 'bf16'"),
        ("decode", "draft", "'full' or 'reduced'"),
        ("img_size", 0, "above 0"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(
    name: str, value: object, allowed: str
) -> None:
    with pytest.raises(SettingError, match=name) as caught:
        EncoderRequest("resnet18", **{name: value})  # type: ignore[arg-type]  # on purpose

    assert allowed in str(caught.value)


@pytest.mark.parametrize("model", ["", "../../etc", "hf-hub:timm/resnet18", "a/b", "C:\\models"])
def test_a_path_is_no_name_of_a_model(model: str) -> None:
    with pytest.raises(ModelError, match="checkpoint_path="):
        EncoderRequest(model)


def test_what_was_put_is_got_back(tmp_path: Path) -> None:
    request = EncoderRequest("resnet18", pretrained=False)
    SpecCache(tmp_path).put(request, None, SPEC)

    found = SpecCache(tmp_path).get(request, None)

    assert found == SPEC
    assert SpecCache(tmp_path).get(EncoderRequest("resnet34", pretrained=False), None) is None


def test_a_pretrained_model_without_weights_is_not_known(tmp_path: Path) -> None:
    request = EncoderRequest("resnet18")
    SpecCache(tmp_path).put(request, None, SPEC)

    assert SpecCache(tmp_path).get(request, None) is None


def test_changed_weights_are_another_encoder(tmp_path: Path) -> None:
    path = a_file_of_weights(tmp_path / "mine")
    request = EncoderRequest("resnet18", checkpoint_path=str(path))
    cache = SpecCache(tmp_path / "specs")
    cache.put(request, find_weights(request, tmp_path), SPEC)

    before = cache.get(request, find_weights(request, tmp_path))
    path.write_bytes(b"longer weights")
    after = cache.get(request, find_weights(request, tmp_path))

    assert before == SPEC
    assert after is None


def test_a_damaged_entry_counts_as_none(tmp_path: Path) -> None:
    request = EncoderRequest("resnet18", pretrained=False)
    SpecCache(tmp_path).put(request, None, SPEC)
    (entry,) = tmp_path.iterdir()
    entry.write_text('{"architecture": "resn')

    assert SpecCache(tmp_path).get(request, None) is None


def test_golden_vectors_within_the_tolerance_keep_the_revision(tmp_path: Path) -> None:
    cache = SpecCache(tmp_path)
    cache.settle(SPEC, GOLDEN, "cpu")

    again = cache.settle(SPEC, GOLDEN + np.float32(0.9e-5), "cpu")

    assert again == SPEC


def test_other_golden_vectors_make_a_revision_that_is_found_again(tmp_path: Path) -> None:
    cache = SpecCache(tmp_path)
    cache.settle(SPEC, GOLDEN, "cpu")
    moved = GOLDEN + np.float32(1e-4)

    other = cache.settle(SPEC, moved, "cpu")
    found_again = cache.settle(SPEC, moved, "cpu")
    back = cache.settle(SPEC, GOLDEN, "cpu")

    assert (other.revision, found_again.revision, back.revision) == (1, 1, 0)
    assert other.fingerprint != SPEC.fingerprint


def test_an_accelerator_need_only_point_the_same_way(tmp_path: Path) -> None:
    cache = SpecCache(tmp_path)
    cache.settle(SPEC, GOLDEN, "cuda")
    # Turned by 0.01 rad: cosine .99995. By 0.02: .9998.
    near, far = (
        GOLDEN @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]], np.float32)
        for a in (0.01, 0.02)
    )

    assert cache.settle(SPEC, near, "cpu").revision == 0
    assert cache.settle(SPEC, far, "cuda").revision == 1


def test_a_given_checkpoint_comes_before_the_models_own_folder(tmp_path: Path) -> None:
    own = a_file_of_weights(tmp_path / "weights" / "resnet18")
    mine = a_file_of_weights(tmp_path / "mine")

    default = find_weights(EncoderRequest("resnet18"), tmp_path)
    given = find_weights(EncoderRequest("resnet18", checkpoint_path=str(mine.parent)), tmp_path)

    assert default is not None
    assert given is not None
    assert (default.path, given.path) == (own, mine)


def test_a_checkpoint_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    request = EncoderRequest("resnet18", checkpoint_path=str(tmp_path / "nothing"))

    with pytest.raises(WeightsNotFoundError, match="nothing"):
        find_weights(request, tmp_path)


def test_the_packaged_weights_serve_their_model_only(tmp_path: Path) -> None:
    found = find_weights(EncoderRequest("tf_efficientnet_lite0"), tmp_path)

    assert found is not None
    assert found.path == packaged_file()
    assert find_weights(EncoderRequest("efficientnet_lite0"), tmp_path) is None


def test_a_digest_is_computed_once_for_a_file_that_did_not_change(tmp_path: Path) -> None:
    path = a_file_of_weights(tmp_path, b"12")
    before = os.stat(path)
    request = EncoderRequest("resnet18", checkpoint_path=str(path))
    weights = find_weights(request, tmp_path)
    assert weights is not None
    first = weights.sha256
    # Other bytes under the same stat: only who reads again would notice.
    path.write_bytes(b"34")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    second = weights.sha256
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    third = weights.sha256

    # sha256 of "12" and of "34".
    assert first == "6b51d431df5d7f141cbececcf79edf3dd861c3b4069f0b11661a3eefacbba918"
    assert second == first
    assert third == "86e50149658661312a9e0b35558d84f6c6d3da797f552a9657fe0558ca40cdef"


def test_packaged_names_become_those_of_timm() -> None:
    packaged = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn1.bias": "bn2.bias",
        "_fc.weight": "classifier.weight",
        # The first block has no expansion: its last convolution is the pointwise one.
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn1.bias": "blocks.0.0.bn1.bias",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        # The third is the second of stage 1, with an expansion.
        "_blocks.2._expand_conv.weight": "blocks.1.1.conv_pw.weight",
        "_blocks.2._bn0.running_mean": "blocks.1.1.bn1.running_mean",
        "_blocks.2._project_conv.weight": "blocks.1.1.conv_pwl.weight",
        "_blocks.15._bn2.weight": "blocks.6.0.bn2.weight",
    }

    assert timm_names(list(packaged)) == list(packaged.values())


@pytest.mark.slow
def test_a_known_encoder_is_resolved_without_torch(tmp_path: Path) -> None:
    request = EncoderRequest("resnet18", pretrained=False)
    SpecCache(tmp_path / "specs").put(request, None, SPEC)
    code = (
        "import sys; from pathlib import Path\n"
        "from toolkit.embedding import runner\n"
        "from toolkit.embedding.spec import EncoderRequest, SpecCache\n"
        "from toolkit.embedding.weights import find_weights\n"
        f"data = Path({str(tmp_path)!r})\n"
        "request = EncoderRequest('resnet18', pretrained=False)\n"
        "spec = SpecCache(data / 'specs').get(request, find_weights(request, data))\n"
        "find_weights(EncoderRequest('tf_efficientnet_lite0'), data)\n"
        "heavy = {'torch', 'timm', 'torchvision', 'huggingface_hub'} & set(sys.modules)\n"
        "print(spec.fingerprint, sorted(heavy))"
    )

    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout

    assert out.split(maxsplit=1) == [SPEC.fingerprint, "[]\n"]
