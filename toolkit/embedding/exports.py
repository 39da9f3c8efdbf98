"""Where exported models lie, and which of them another engine is not to run.

Law: no torch here. A note that a model is unfit is named by everything that an export depends
on, so that another version of a library is tried anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from toolkit.embedding.spec import EncoderRequest, read_json, version_of, write_json
from toolkit.embedding.weights import WeightsFile, find_weights

#: Processes that may crash one after the other while they load a model on another engine than
#: torch. After the first one the export is made anew: it may be damaged.
MOST_CRASHES = 2


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


def export_folder(engine_dir: Path, request: EncoderRequest, weights: WeightsFile | None) -> Path:
    """The folder of an exported model; exact and fast encoders share one."""
    parts = {
        "request": {**request.exact.to_json(), "checkpoint_path": None},
        "weights": weights.sha256 if weights else None,
        "config": read_json(weights.config) if weights and weights.config else None,
        "versions": [version_of(name) for name in ("openvino", "timm", "torch")],
    }
    text = json.dumps(parts, sort_keys=True)
    return engine_dir / f"{request.model}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def crash_note(folder: Path, precision: str) -> Path:
    """The note that processes crashed over a model, of one precision each.

    Args:
        folder: From :func:`export_folder`. The note lies beside it: it is to outlive the export.
        precision: That of the request.
    """
    return folder.with_name(f"{folder.name}-{precision}-crash.json")


def write_crash_note(note: Path, reason: str) -> None:
    """Leave a model to torch from now on.

    Raises:
        OSError: If it cannot be written.
    """
    write_json(note, {"reason": reason})


def find_crash(request: EncoderRequest, *, data_dir: Path, engine_dir: Path) -> str | None:
    """Why torch runs a model that OpenVINO should: which crash, and how to have it tried again.

    Returns:
        ``None`` where no process crashed.

    Raises:
        WeightsNotFoundError: If ``checkpoint_path`` leads nowhere.
    """
    weights = find_weights(request, data_dir)
    note = crash_note(export_folder(engine_dir, request, weights), request.precision)
    reason = read_json(note).get("reason")
    return f"{reason}; to try it again, remove {note}" if reason else None
