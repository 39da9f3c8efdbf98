"""The process of a worker that runs the task: the pool's own in prefork, else the main one."""

from __future__ import annotations

import json
import os
import threading

from toolkit import config
from toolkit.cluster.protocol import ENCODERS_VARIABLE
from toolkit.config import Settings
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import SettingError
from toolkit.worker.embedder import Embedder
from toolkit.worker.presence import WorkBeat

_state: dict[str, object] = {}


def served() -> list[EncoderRequest]:
    """The encoders that this worker was started for.

    Raises:
        SettingError: If :data:`ENCODERS_VARIABLE` cannot be understood.
    """
    text = os.environ.get(ENCODERS_VARIABLE)
    if not text:
        return [EncoderRequest(config.resolve().model)]
    try:
        return [EncoderRequest.from_json(value) for value in json.loads(text)]
    except (ValueError, TypeError) as error:
        allowed = 'a JSON list such as [{"model": "vit_base_patch16_224"}]'
        raise SettingError(ENCODERS_VARIABLE, text, allowed, "environment") from error


def start(settings: Settings, *, parent: int | None) -> Embedder:
    """Begin to load and to beat, in threads; the process goes on at once.

    Args:
        settings: The worker's.
        parent: Process with which this one is to end, for a pool's process.
    """
    requests = served()
    made = Embedder(requests, settings)
    beat = WorkBeat(made, settings, parent)
    _state.update(embedder=made, beat=beat, is_pool=parent is not None)

    def load() -> None:
        made.load()
        beat.beat.now()

    beat.beat.start()
    threading.Thread(target=load, name="load", daemon=True).start()
    return made


def stop() -> None:
    """Stop the child and fall silent."""
    beat, made = _state.get("beat"), _state.get("embedder")
    if isinstance(beat, WorkBeat):
        beat.beat.stop()
    if isinstance(made, Embedder):
        made.close()


def embedder() -> Embedder:
    """This process's embedder; started here if the pool started this process without us."""
    made = _state.get("embedder")
    if not isinstance(made, Embedder):
        made = start(config.resolve(), parent=None)
    return made


def is_pool_process() -> bool:
    """Whether this process is one of a prefork pool, which has limits of its own."""
    return bool(_state.get("is_pool"))
