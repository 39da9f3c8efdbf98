"""From whatever a user asks with to a vector: files, pictures and pixels through the child."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from toolkit.config import Settings
from toolkit.dispatch.local import BATCH_BYTES, warm_executor
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

# Bytes of one picture that is not in a dataset.
_MAX_PICTURE_BYTES = 512 << 20


def embed_bytes(
    pictures: Sequence[bytes], request: EncoderRequest, settings: Settings
) -> tuple[NDArray[np.float32], EncoderSpec]:
    """Embed pictures that are held in memory, in this process's child.

    Returns:
        float32, shape ``(n, dim)``, and the encoder that did it.

    Raises:
        DecodeError: If one is no picture; the message names its place, from 0.
        RoadError: If the child dies or hangs over them.
    """
    parts = []
    with warm_executor(request, settings) as executor:
        spec = executor.start()
        for batch, given in _batches(pictures, spec.fingerprint):
            outcome = executor.embed(batch, given)
            for failed in outcome.failed:
                which = f"picture {failed.item_id} of {len(pictures)}: " * (len(pictures) > 1)
                # What follows is advice for a dataset.
                raise DecodeError(which + failed.reason.partition(";")[0])
            parts.append(outcome.vectors)
    empty = np.empty((0, spec.dim), np.float32)
    return np.concatenate([empty, *parts]), spec


def _batches(
    pictures: Sequence[bytes], fingerprint: str
) -> Iterator[tuple[Batch, dict[int, bytes]]]:
    """Cut by count and by bytes: a batch crosses a pipe in one frame."""
    given: dict[int, bytes] = {}
    for n, data in enumerate(pictures):
        if len(data) > _MAX_PICTURE_BYTES:
            raise QueryError(f"picture {n} has {len(data) >> 20} MiB; put it into a dataset")
        full = len(given) == _EMBED_BATCH or sum(map(len, given.values())) > BATCH_BYTES
        if given and full:
            yield _batch(given, fingerprint), given
            given = {}
        given[n] = data
    if given:
        yield _batch(given, fingerprint), given


def _batch(given: dict[int, bytes], fingerprint: str) -> Batch:
    items = tuple(Item(n, b"", len(data)) for n, data in given.items())
    return Batch(min(given), fingerprint, items)


def file_bytes(picture: Query) -> bytes:
    """The bytes of a picture's file, whatever it was given as.

    Raises:
        QueryError: If there is no such file, or it is neither a picture nor pixels.
        UnreadableError: If the file cannot be read.
    """
    if not isinstance(picture, (str, bytes, os.PathLike)):
        return _png(picture)
    path = os.path.abspath(os.path.expanduser(os.fsencode(picture)))
    if not os.path.isfile(path):
        what = "is a folder, not a picture" if os.path.isdir(path) else "does not exist"
        raise QueryError(f"{show_path(path)} {what}")
    return read_file(path)[0]


def _png(picture: Any) -> bytes:
    """A picture in memory as the bytes of a file that holds the same pixels."""
    from PIL import Image, ImageOps  # deferred: queries by path or vector need no Pillow

    if isinstance(picture, np.ndarray):
        is_grey = picture.ndim == 2
        is_colour = picture.ndim == 3 and picture.shape[2] in (3, 4)
        if picture.dtype != np.uint8 or not picture.size or not (is_grey or is_colour):
            raise QueryError(
                f"an array of {picture.dtype} {picture.shape} is neither pixels (uint8, height x "
                "width x 3) nor a vector (one dimension)"
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise QueryError(f"a query is a path, a picture or a vector, not {type(picture).__name__}")
    # A picture that was opened from a file is turned as its file would be.
    picture = ImageOps.exif_transpose(picture)
    file = io.BytesIO()
    keeps = picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    # PNG is lossless; level 1 because the file lives for a millisecond.
    (picture if keeps else picture.convert("RGB")).save(file, "PNG", compress_level=1)
    return file.getvalue()
