"""From whatever a user asks with to a vector: files, pictures and pixels through the child."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from toolkit.config import Settings
from toolkit.dispatch.local import warm_executor
from toolkit.embedding.spec import EncoderRequest, EncoderSpec
from toolkit.errors import DecodeError, QueryError
from toolkit.images.decode import read_file
from toolkit.records import Batch, Item, show_path

if TYPE_CHECKING:
    from PIL import Image

#: What may be asked for: a path, a picture, an array of pixels, or a vector.
Query: TypeAlias = "str | bytes | os.PathLike[str] | Image.Image | NDArray[Any]"

#: Images of one call that are embedded at once.
_EMBED_BATCH = 64


def embed_bytes(
    pictures: Sequence[bytes], request: EncoderRequest, settings: Settings
) -> tuple[NDArray[np.float32], EncoderSpec]:
    """Embed pictures that are held in memory, in this process's child.

    Returns:
        float32, shape ``(n, dim)``, and the encoder that did it.

    Raises:
        DecodeError: If one is no picture; the message names its place.
        RoadError: If the child dies or hangs over them.
    """
    parts = []
    with warm_executor(request, settings) as executor:
        spec = executor.start()
        for start in range(0, len(pictures), _EMBED_BATCH):
            given = dict(enumerate(pictures[start : start + _EMBED_BATCH], start))
            items = tuple(Item(n, b"", len(data)) for n, data in given.items())
            outcome = executor.embed(Batch(start, spec.fingerprint, items), given)
            for failed in outcome.failed:
                raise DecodeError(f"picture {failed.item_id}: {failed.reason}")
            parts.append(outcome.vectors)
    empty = np.empty((0, spec.dim), np.float32)
    return np.concatenate([empty, *parts]), spec


def file_bytes(picture: Query) -> bytes:
    """The bytes of a picture's file, whatever it was given as.

    Raises:
        QueryError: If there is no such file, or it is neither a picture nor pixels.
        UnreadableError: If the file cannot be read.
    """
    if not isinstance(picture, (str, bytes, os.PathLike)):
        return _png(picture)
    path = os.path.abspath(os.path.expanduser(os.fsencode(picture)))
    if not os.path.exists(path):
        raise QueryError(f"no file {show_path(path)}")
    return read_file(path)[0]


def _png(picture: Any) -> bytes:
    """A picture in memory as the bytes of a file that holds the same pixels."""
    from PIL import Image  # deferred: queries by path or vector need no Pillow

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise QueryError(
                f"an array of {picture.dtype} {picture.shape} is neither pixels (uint8, height x "
                "width x 3) nor a vector (one dimension)"
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise QueryError(f"a query is a path, a picture or a vector, not {type(picture).__name__}")
    file = io.BytesIO()
    keeps = picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    # PNG is lossless; level 1 because the file lives for a millisecond.
    (picture if keeps else picture.convert("RGB")).save(file, "PNG", compress_level=1)
    return file.getvalue()
