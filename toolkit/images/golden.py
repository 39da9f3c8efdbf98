"""Golden files, one for each format: whether two machines decode alike is seen from these.

Torch-free and small: a worker says what it makes of them when it starts, and a client
compares that with what it makes of them itself.
"""

from __future__ import annotations

import functools
from importlib import resources

from toolkit.errors import DecodeError
from toolkit.images.decode import decode
from toolkit.images.identity import image_key

#: A file for each format of :mod:`toolkit.images.decode`; the name is the format's.
_FOLDER = "golden"


@functools.cache
def format_digests() -> dict[str, str]:
    """Each format that is decoded here → digest of what its golden file decodes to."""
    digests = {}
    for file in (resources.files("toolkit.samples") / _FOLDER).iterdir():
        try:
            picture = decode(file.read_bytes())
        except (DecodeError, ImportError):
            continue  # a build of the library without this format
        digests[picture.format] = image_key(picture.rgb.tobytes()).hex()
    return digests
