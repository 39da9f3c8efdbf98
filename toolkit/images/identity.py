"""What tells one content from another: the key of all its bytes, the probe of a few."""

from __future__ import annotations

#: Bytes that are read from either end of a file whose content may be known already.
PROBE_BYTES = 64 << 10


def image_key(data: bytes) -> bytes:
    """The content key of an image: xxh3_128 of all its bytes, 16 bytes, big-endian."""
    import xxhash  # Deferred, as Pillow is: whoever takes only a constant pays nothing.

    return xxhash.xxh3_128_digest(data)


def probe_of(data: bytes) -> bytes:
    """The probe of a whole content, as :func:`probe_of_ends` has it from a file's ends."""
    tail = data[-PROBE_BYTES:] if len(data) > PROBE_BYTES else b""
    return probe_of_ends(len(data), data[:PROBE_BYTES], tail)


def probe_of_ends(size: int, head: bytes, tail: bytes) -> bytes:
    """Digest of a size and both ends; cheap, and no proof: two contents may share it.

    Args:
        size: Bytes of the whole content.
        head: The first :data:`PROBE_BYTES` of it.
        tail: As many of its end, or nothing where ``head`` is all there is.
    """
    return image_key(size.to_bytes(8, "little") + head + tail)
