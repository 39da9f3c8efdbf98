"""The values that travel through the house, and the one way they cross a process boundary.

A road carries a :class:`Batch` one way and an :class:`Outcome` back. Both have a JSON form
(and the vectors a raw float32 blob), used on every road: local runs find the same bugs.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray


class FailureKind(enum.StrEnum):
    """Why an image has no vector; decides whether it is tried again.

    ``decode`` and ``crash`` are remembered by content and not paid twice; the others are
    tried again by the next build. ``model``: the model gave no finite vector.
    """

    DECODE = "decode"
    CRASH = "crash"
    UNREADABLE = "unreadable"
    CHANGED = "changed"
    MODEL = "model"

    @property
    def is_permanent(self) -> bool:
        """Whether the same bytes would fail again."""
        return self in (FailureKind.DECODE, FailureKind.CRASH)


@dataclasses.dataclass(frozen=True, slots=True)
class FileStat:
    """What the file system says of a file without reading it.

    Attributes:
        size: Bytes.
        mtime_ns: Last change of the content, nanoseconds since the epoch.
        ctime_ns: Last change of the inode, nanoseconds since the epoch.
        inode: Number of the inode on its device.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileStat:
        """Keep what tells one version of a file from another."""
        # st_ino is unsigned and may pass 2**63 on network file systems; SQLite is signed.
        inode = stat.st_ino - (1 << 64) if stat.st_ino >= 1 << 63 else stat.st_ino
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, inode)


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image to embed.

    Attributes:
        id: Number within the run, unique.
        path: Where it lies, as the bytes of the file system.
        size: Bytes, as the scan saw it; batches are cut by it.
        key: Content key when the client knows it already, else ``None``.
        probe: Digest of size and both ends, as the scan saw them: who reads the file tells
            by it that this is another one, where its content is not known.
    """

    id: int
    path: bytes
    size: int
    key: bytes | None = None
    probe: bytes | None = None

    def to_json(self) -> list[Any]:
        """The compact JSON form."""
        return [self.id, self.path.hex(), self.size, _hex(self.key), _hex(self.probe)]

    @classmethod
    def from_json(cls, value: list[Any]) -> Item:
        """Read back :meth:`to_json`."""
        item_id, path, size, key, probe = value
        return cls(int(item_id), bytes.fromhex(path), int(size), _unhex(key), _unhex(probe))


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """What goes out at once.

    Attributes:
        id: Number within the run, unique.
        fingerprint: The encoder that must do it.
        items: In the order in which the outcome answers.
    """

    id: int
    fingerprint: str
    items: tuple[Item, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        items = [item.to_json() for item in self.items]
        return {"id": self.id, "fingerprint": self.fingerprint, "items": items}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Batch:
        """Read back :meth:`to_json`."""
        items = tuple(Item.from_json(item) for item in value["items"])
        return cls(int(value["id"]), str(value["fingerprint"]), items)


@dataclasses.dataclass(frozen=True, slots=True)
class Embedded:
    """An image that became a vector: row ``row`` of its outcome's ``vectors``.

    Attributes:
        item_id: The item answered.
        key: Content key of the bytes that were decoded.
        row: Row in the outcome's vectors.
        width: Pixels, upright (EXIF rotation applied).
        height: Pixels, upright.
        format: Name of the file format, as Pillow calls it.
        stat: The file as it was read; ``None`` when it came as bytes.
    """

    item_id: int
    key: bytes
    row: int
    width: int
    height: int
    format: str
    stat: FileStat | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """An image that has no vector, and why.

    Attributes:
        item_id: The item answered.
        kind: Decides whether it is tried again.
        reason: One sentence for a person.
        key: Content key when the bytes could be read whole.
        stat: The file as it was read, when it could be.
    """

    item_id: int
    kind: FailureKind
    reason: str
    key: bytes | None = None
    stat: FileStat | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The answer to a batch: every item once, embedded or failed.

    Attributes:
        batch_id: The batch answered.
        fingerprint: The encoder that answered.
        embedded: The images that became vectors.
        failed: The others.
        vectors: float32, shape ``(len(embedded), dim)``, each row of length 1.
        seconds: Wall time in the process that did it.
    """

    batch_id: int
    fingerprint: str
    embedded: tuple[Embedded, ...]
    failed: tuple[Failed, ...]
    vectors: NDArray[np.float32]
    seconds: float = 0.0

    @classmethod
    def empty(cls, batch_id: int, fingerprint: str, failed: tuple[Failed, ...] = ()) -> Outcome:
        """An answer that holds no vector."""
        return cls(batch_id, fingerprint, (), failed, np.empty((0, 0), np.float32))

    def to_json(self) -> dict[str, Any]:
        """Everything but the vectors."""
        return {
            "batch_id": self.batch_id,
            "fingerprint": self.fingerprint,
            "embedded": [
                [e.item_id, e.key.hex(), e.row, e.width, e.height, e.format, _stat_json(e.stat)]
                for e in self.embedded
            ],
            "failed": [
                [f.item_id, f.kind.value, f.reason, _hex(f.key), _stat_json(f.stat)]
                for f in self.failed
            ],
            "shape": list(self.vectors.shape),
            "seconds": self.seconds,
        }

    def blob(self) -> bytes:
        """The vectors as raw little-endian float32, row after row."""
        return np.ascontiguousarray(self.vectors, dtype="<f4").tobytes()

    @classmethod
    def from_json(cls, value: dict[str, Any], blob: bytes) -> Outcome:
        """Read back :meth:`to_json` and :meth:`blob`.

        Raises:
            ValueError: If the blob is not of the length that the shape says.
        """
        n, dim = (int(x) for x in value["shape"])
        if len(blob) != n * dim * 4:
            raise ValueError(f"{len(blob)} bytes of vectors, {n} x {dim} x 4 expected")
        embedded = tuple(
            Embedded(int(i), bytes.fromhex(key), int(row), int(w), int(h), str(fmt), _stat(stat))
            for i, key, row, w, h, fmt, stat in value["embedded"]
        )
        failed = tuple(
            Failed(
                int(i),
                FailureKind(kind),
                str(reason),
                bytes.fromhex(key) if key else None,
                _stat(stat),
            )
            for i, kind, reason, key, stat in value["failed"]
        )
        vectors = np.frombuffer(blob, dtype="<f4").reshape(n, dim).astype(np.float32, copy=False)
        return cls(
            int(value["batch_id"]),
            str(value["fingerprint"]),
            embedded,
            failed,
            vectors,
            float(value["seconds"]),
        )


def show_path(path: bytes) -> str:
    """A path as text: backslash escapes where its bytes are not UTF-8."""
    return path.decode("utf-8", "backslashreplace")


def _hex(key: bytes | None) -> str | None:
    return key.hex() if key is not None else None


def _unhex(text: str | None) -> bytes | None:
    return bytes.fromhex(text) if text is not None else None


def _stat_json(stat: FileStat | None) -> list[int] | None:
    return [stat.size, stat.mtime_ns, stat.ctime_ns, stat.inode] if stat else None


def _stat(value: list[int] | None) -> FileStat | None:
    return FileStat(*(int(x) for x in value)) if value else None
