"""The model as plain timm makes it, with weights that are known to fit, or a reason why not.

Law: nothing here makes a model fast or different; :mod:`toolkit.embedding.torch_model` does,
and measures itself against this. The two are the only rooms that import torch and timm.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg, clean_state_dict, load_state_dict

from toolkit.embedding.preprocess import golden_pictures, prepare
from toolkit.embedding.spec import (
    EncoderRequest,
    EncoderSpec,
    Preprocessing,
    read_json,
    write_json,
)
from toolkit.embedding.weights import (
    PACKAGED_CONFIG,
    PACKAGED_MODEL,
    WEIGHT_NAMES,
    WeightsFile,
    fetch_weights,
    find_weights,
    model_dir,
    packaged_file,
    timm_names,
)
from toolkit.errors import ModelError, WeightsNotFoundError
from toolkit.images.decode import DECODE_VERSION

#: Fields of timm's config that name a place of weights; ours is the file that was found.
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}


def obtain_weights(request: EncoderRequest, data_dir: Path) -> WeightsFile | None:
    """The weights of a request in a form that timm loads; ``None`` for random ones.

    They come from where :func:`toolkit.embedding.weights.find_weights` looks, then from the
    Hugging Face hub.

    Raises:
        ModelError: If timm does not know the model.
        WeightsNotFoundError: If there are none at hand and the hub gives none.
    """
    _check_name(request.model)
    if not request.has_weights:
        return None
    found = find_weights(request, data_dir)
    if found is None:
        config = timm.get_pretrained_cfg(request.model)
        if config is None or not config.hf_hub_id:
            raise WeightsNotFoundError(request.model, "timm names no place for them")
        return fetch_weights(request.model, config.hf_hub_id, config.hf_hub_filename, data_dir)
    if found.path == packaged_file():
        _convert_packaged(found.path, model_dir(PACKAGED_MODEL, data_dir))
        found = find_weights(request, data_dir)
    return found


def _convert_packaged(path: Path, folder: Path) -> None:
    """Write the packaged weights as the folder that timm loads, at once or not at all."""
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    names = timm_names(list(packaged))
    tensors = [tensor.contiguous() for tensor in packaged.values()]
    folder.mkdir(parents=True, exist_ok=True)
    # First, since the weights are found by their file.
    write_json(folder / "config.json", PACKAGED_CONFIG)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = Path(temporary) / WEIGHT_NAMES[0]
        save_file(dict(zip(names, tensors, strict=True)), file)
        os.replace(file, folder / WEIGHT_NAMES[0])


def make_plain(
    request: EncoderRequest, weights: WeightsFile | None
) -> tuple[EncoderSpec, torch.nn.Module]:
    """The model, and what its vectors are.

    Raises:
        ModelError: If timm cannot make it as asked for, or the weights are of another one.
    """
    model = make_model(request, weights)
    spec = EncoderSpec(
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
    _check_transform(spec.preprocessing)
    return spec, model


def make_model(request: EncoderRequest, weights: WeightsFile | None) -> torch.nn.Module:
    """The model in evaluation mode; it gives one vector for a picture.

    Raises:
        ModelError: If timm cannot make it as asked for, or the weights are of another one.
    """
    options: dict[str, Any] = {}
    if request.global_pool is not None:
        options["global_pool"] = request.global_pool
    if request.head == "features":
        options["num_classes"] = 0
    else:
        _check_has_projection(request.model)
    if weights is not None:
        options |= {"pretrained": True, **_described(request.model, weights)}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed or 0)
            model = _create(request, **options)
        if weights is not None:
            _check_fit(request, weights, model, options)
        shape = output_shape(request, model.eval())
    except ModelError:
        raise
    # Broad: timm's builders let out whatever an argument makes them stumble on.
    except Exception as error:
        asked = {k: v for k, v in request.to_json().items() if k != "model" and v is not None}
        source = f" with the weights in {weights.path}" if weights else ""
        raise ModelError(
            f"timm cannot make {request.model}{source}: {short(error)}. Asked for was {asked}; "
            "leave out what the model does not take, and give weights that were made for it"
        ) from error
    if len(shape) != 2:
        raise ModelError(
            f"{request.model} with global_pool={request.global_pool!r} gives {shape}, not one "
            "vector for one picture; leave global_pool out"
        )
    return model


def data_config(request: EncoderRequest, model: torch.nn.Module) -> Preprocessing:
    """From a picture to the input of this model, as its config says."""
    asked = {"img_size": request.img_size}
    # timm has no types for this one.
    config = resolve_data_config(asked, model=model)  # type: ignore[no-untyped-call]
    return Preprocessing.from_json(config)


def output_shape(request: EncoderRequest, model: torch.nn.Module) -> tuple[int, ...]:
    """Shape of the output for one picture."""
    with torch.inference_mode():
        return tuple(model(torch.zeros(1, *data_config(request, model).input_size)).shape)


def _check_transform(how: Preprocessing) -> None:
    """Refuse a model whose pictures timm prepares in another way than we do."""
    transform = create_transform(**dataclasses.asdict(how), normalize=False)
    for picture in golden_pictures():
        if not np.array_equal(transform(picture).permute(1, 2, 0).numpy(), prepare(picture, how)):
            raise ModelError(
                f"timm {timm.__version__} prepares pictures in a way that this release does not "
                f"know ({how}); install a release of the two that were made for each other"
            )


def _check_name(model: str) -> None:
    name = model.partition(".")[0]
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        cure = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ModelError(f"timm {timm.__version__} knows no model {name!r}; {cure}")


def _check_has_projection(model: str) -> None:
    """Refuse what is no CLIP tower, and the towers whose projection gave way to classes."""
    config = timm.get_pretrained_cfg(model)
    name = f"{model}.{config.tag}" if config and "." not in model else model
    is_tower = "clip" in name or "pe_core" in name
    if not is_tower or "_ft_in" in name or not config or not config.num_classes:
        raise ModelError(
            f"{name} has no projection head; take head='features', or the tag of a CLIP tower "
            "such as vit_base_patch32_clip_224.openai"
        )


def _create(request: EncoderRequest, **options: Any) -> torch.nn.Module:
    model: torch.nn.Module
    if request.img_size is not None:
        try:
            model = timm.create_model(request.model, img_size=request.img_size, **options)
            return model
        except TypeError as error:
            # A convolutional model takes any size and no such argument.
            if "img_size" not in str(error):
                raise
    model = timm.create_model(request.model, **options)
    return model


def _described(model: str, weights: WeightsFile) -> dict[str, Any]:
    """Arguments that tell timm of a file of weights: the config beside it, or the registry's."""
    source = {"file": str(weights.path), "custom_load": False}
    if weights.config is None:
        return {"pretrained_cfg_overlay": source}
    config = read_json(weights.config)
    architecture = model.partition(".")[0]
    if config["architecture"] != architecture:
        raise ModelError(
            f"{weights.path} holds weights of {config['architecture']}, not of {architecture}; "
            f"ask for model={config['architecture']!r}"
        )
    if config.get("model_args"):
        raise ModelError(
            f"{weights.config} builds the model with model_args={config['model_args']}, which "
            "are not taken here; give img_size= or global_pool= and remove them there"
        )
    described = {**config.get("pretrained_cfg", config)}
    if "num_classes" in config:
        described["num_classes"] = config["num_classes"]
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - _SOURCES
    taken = {name: value for name, value in described.items() if name in known}
    return {"pretrained_cfg": {**taken, **source}}


def _check_fit(
    request: EncoderRequest,
    weights: WeightsFile,
    model: torch.nn.Module,
    options: dict[str, Any],
) -> None:
    """Raise what timm says of weights that do not fit; without a head it says nothing.

    It loads what it finds then, and leaves the rest of the model random.
    """
    config: Any = model.pretrained_cfg
    head = config.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((head,) if isinstance(head, str) else head))
    odd = {
        name
        for name in _tensor_names(weights.path) ^ model.state_dict().keys()
        if not name.startswith(heads) and not name.endswith("num_batches_tracked")
    }
    if odd:
        # Names of another time or another library, which timm translates, or the wrong file:
        # with its head the model takes all or nothing.
        strict = {k: v for k, v in options.items() if k != "num_classes"}
        _create(request, **strict)


def _tensor_names(path: Path) -> set[str]:
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            return set(clean_state_dict(dict.fromkeys(file.keys())))
    return set(load_state_dict(str(path)))


def short(error: BaseException) -> str:
    """An error of a library on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
