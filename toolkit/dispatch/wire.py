"""Frames between this process and an embedding child: a JSON head and raw blobs.

Law: nothing that is read here is ever executed; a frame that cannot be read is a dead child.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import IO, Any

_HEAD = struct.Struct("<II")

#: A frame longer than this is garbage, not a frame.
MAX_FRAME_BYTES = 1 << 30


def write_frame(file: IO[bytes], head: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    """Write one frame and flush it.

    Raises:
        ValueError: If it is longer than :data:`MAX_FRAME_BYTES`; nothing is written then.
    """
    text = json.dumps({**head, "blobs": [len(blob) for blob in blobs]}).encode()
    if len(text) + sum(map(len, blobs)) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(text) + sum(map(len, blobs))} bytes")
    file.write(_HEAD.pack(len(text), sum(map(len, blobs))))
    file.write(text)
    for blob in blobs:
        file.write(blob)
    file.flush()


def read_frame(file: IO[bytes]) -> tuple[dict[str, Any], list[bytes]] | None:
    """Read one frame; ``None`` at the end of the stream.

    Raises:
        ValueError: If what comes is not a frame.
    """
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    n_text, n_blobs = _HEAD.unpack(head)
    if n_text + n_blobs > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {n_text + n_blobs} bytes")
    text = file.read(n_text)
    if len(text) < n_text:
        return None
    value: dict[str, Any] = json.loads(text)
    # One by one, so that no picture is copied out of a whole of them.
    sizes = value.pop("blobs")
    if sum(sizes) != n_blobs:
        raise ValueError(f"a frame of blobs of {sizes} bytes that says {n_blobs}")
    blobs = [file.read(size) for size in sizes]
    if sum(map(len, blobs)) < n_blobs:
        return None
    return value, blobs
