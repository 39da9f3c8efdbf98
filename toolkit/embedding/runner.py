"""The one function that embeds a batch, the same on every road: read, decode ahead, encode.

Law: no torch here, the encoder is given. A picture that fails is answered with its reason and
stops nothing else; an encoder that fails is the caller's affair. A picture is stamped before
it is touched, so that whoever watches knows which one killed or hung the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.embedding.preprocess import least_edge
from toolkit.embedding.spec import EncoderSpec
from toolkit.errors import ChangedError, DecodeError, RunCancelledError, UnreadableError
from toolkit.images.decode import decode, read_file
from toolkit.images.identity import image_key, probe_of
from toolkit.records import Batch, Embedded, Failed, FailureKind, FileStat, Item, Outcome, show_path

if TYPE_CHECKING:
    from PIL import Image

#: A picture with more pixels is decoded while no other is: 200 megapixels take 0.8 GB and,
#: turned upright, twice that for a moment.
LARGE_PIXELS = 50_000_000

#: A file with more bytes counts as large too: its bytes are in memory while it is decoded.
LARGE_BYTES = 64 << 20

#: Batches whose pictures wait decoded, at most: 0.15 MB for one of 224 x 224 pixels.
BATCHES_AHEAD = 2

#: Seconds between two looks at whether the batch is cancelled while a picture is awaited.
_POLL_S = 0.2


class ProgressSink(Protocol):
    """Hears of each step; called from several threads.

    ``start`` before an item is touched and ``done`` when it is decoded or has failed, each
    with the item's number; ``encode`` before the model runs, with the first of its items.
    """

    def __call__(self, item_id: int, stage: str) -> None:
        """Hear that an item came to a stage."""


class PixelEncoder(Protocol):
    """What :class:`toolkit.embedding.encoder.Encoder` is to this room."""

    spec: EncoderSpec

    @property
    def at_once(self) -> int:
        """Images that are best given to :meth:`encode` at once."""

    def prepare(self, rgb: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture to shape ``(height, width, 3)``; called from several threads."""

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Shape ``(n, height, width, 3)`` to ``(n, dim)``, rows of length 1 or not finite."""


class _Ready(NamedTuple):
    """A decoded picture on its way to the model."""

    answer: Embedded
    pixels: NDArray[np.uint8]


_Decoded = Future[_Ready | Failed]


class Runner:
    """Embeds batches with one encoder, one after the other.

    Attributes:
        max_pixels: Pictures with more are refused.

    Args:
        encoder: The loaded model.
        decode_threads: Threads that read and decode.
    """

    def __init__(self, encoder: PixelEncoder, *, decode_threads: int, max_pixels: int) -> None:
        self._encoder = encoder
        is_reduced = encoder.spec.decode == "reduced"
        self._least_edge = least_edge(encoder.spec.preprocessing) if is_reduced else None
        self.max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(decode_threads, "decode")
        self._memory = _Memory(decode_threads)
        self._ahead: dict[Batch, list[_Decoded]] = {}

    def prefetch(
        self, batch: Batch, progress: ProgressSink, *, blobs: Mapping[int, bytes] | None = None
    ) -> None:
        """Begin to read and decode a batch that :meth:`embed` will be given later.

        Does nothing while :data:`BATCHES_AHEAD` batches wait. The arguments are those of
        :meth:`embed`.
        """
        if len(self._ahead) < BATCHES_AHEAD:
            self._ahead[batch] = self._begin(batch, progress, blobs or {})

    def embed(
        self,
        batch: Batch,
        progress: ProgressSink,
        cancelled: Callable[[], bool],
        *,
        blobs: Mapping[int, bytes] | None = None,
    ) -> Outcome:
        """Embed a batch; encodes what is decoded while the rest still decodes.

        Args:
            batch: What to embed.
            progress: Hears of each step.
            cancelled: Asked before the model runs and while it waits; ``True`` ends the batch.
            blobs: Content of items by their number, which are not read from their path then.

        Returns:
            Every item once, embedded or failed, in the order of the batch.

        Raises:
            RunCancelledError: If ``cancelled`` said so.
        """
        began = time.monotonic()
        decoded = self._ahead.pop(batch, None) or self._begin(batch, progress, blobs or {})
        answers = _Answers(self._encoder, progress, cancelled)
        try:
            for future in decoded:
                answers.take(future)
            return answers.outcome(batch, began)
        finally:
            for future in decoded:
                future.cancel()

    def close(self) -> None:
        """Give up what was prefetched, and the threads."""
        self._ahead.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, batch: Batch, progress: ProgressSink, blobs: Mapping[int, bytes]
    ) -> list[_Decoded]:
        return [
            self._pool.submit(self._decode, item, blobs.get(item.id), progress)
            for item in batch.items
        ]

    def _decode(self, item: Item, blob: bytes | None, progress: ProgressSink) -> _Ready | Failed:
        progress(item.id, "start")
        try:
            if item.size <= LARGE_BYTES:
                with self._memory.share():
                    limit = min(LARGE_PIXELS, self.max_pixels)
                    answer = self._attempt(item, blob, limit)
                may_be_large = isinstance(answer, Failed) and answer.kind is FailureKind.DECODE
                if not may_be_large or limit == self.max_pixels:
                    return answer
            with self._memory.take_all():
                return self._attempt(item, blob, self.max_pixels)
        finally:
            progress(item.id, "done")

    def _attempt(self, item: Item, blob: bytes | None, max_pixels: int) -> _Ready | Failed:
        key, stat = None, None
        try:
            data, stat = (blob, None) if blob is not None else _read(item)
            key = image_key(data)
            if not _is_what_was_seen(item, data, key, by_path=blob is None):
                raise ChangedError(
                    f"{show_path(item.path)} changed while being read: it is no longer what the "
                    "scan saw; the next build tries it again"
                )
            picture = decode(data, max_pixels=max_pixels, least_edge=self._least_edge)
            pixels = self._encoder.prepare(picture.decoded)
        except (UnreadableError, ChangedError, DecodeError) as error:
            return Failed(item.id, _KINDS[type(error)], str(error), key, stat)
        except MemoryError:
            # A matter of the machine, not of the bytes: they are not held against the picture.
            reason = "there was not enough memory to decode it; the next build tries it again"
            return Failed(item.id, FailureKind.UNREADABLE, reason, key, stat)
        size = picture.width, picture.height
        # The row is known when the model has run.
        answer = Embedded(item.id, key, -1, *size, picture.format, stat)
        return _Ready(answer, pixels)


#: What an error of a picture means for the next build.
_KINDS: dict[type[Exception], FailureKind] = {
    UnreadableError: FailureKind.UNREADABLE,
    ChangedError: FailureKind.CHANGED,
    DecodeError: FailureKind.DECODE,
}


class _Memory:
    """Room for as many pictures of common size as there are threads, or for one large one."""

    def __init__(self, n_shares: int) -> None:
        self._n_shares = n_shares
        self._shares = threading.Semaphore(n_shares)
        # Who waits for all of them is not overtaken by those who need one.
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def share(self) -> Iterator[None]:
        with self._turn:
            self._shares.acquire()
        try:
            yield
        finally:
            self._shares.release()

    @contextlib.contextmanager
    def take_all(self) -> Iterator[None]:
        with self._turn:
            for _ in range(self._n_shares):
                self._shares.acquire()
        try:
            yield
        finally:
            self._shares.release(self._n_shares)


class _Answers:
    """The outcome of a batch as it grows."""

    def __init__(
        self, encoder: PixelEncoder, progress: ProgressSink, cancelled: Callable[[], bool]
    ) -> None:
        self._encoder, self._progress, self._cancelled = encoder, progress, cancelled
        self._waiting: list[_Ready] = []
        self._embedded: list[Embedded] = []
        self._failed: list[Failed] = []
        self._vectors = [np.empty((0, encoder.spec.dim), np.float32)]

    def take(self, future: _Decoded) -> None:
        while not wait([future], timeout=_POLL_S).done:
            self._stop_if_cancelled()
        answer = future.result()
        if isinstance(answer, Failed):
            self._failed.append(answer)
            return
        self._waiting.append(answer)
        if len(self._waiting) >= self._encoder.at_once:
            self._encode()

    def outcome(self, batch: Batch, began: float) -> Outcome:
        if self._waiting:
            self._encode()
        place = {item.id: n for n, item in enumerate(batch.items)}
        return Outcome(
            batch.id,
            self._encoder.spec.fingerprint,
            tuple(self._embedded),
            tuple(sorted(self._failed, key=lambda failed: place[failed.item_id])),
            np.concatenate(self._vectors),
            time.monotonic() - began,
        )

    def _encode(self) -> None:
        self._stop_if_cancelled()
        answers = [ready.answer for ready in self._waiting]
        self._progress(answers[0].item_id, "encode")
        vectors = self._encoder.encode(np.stack([ready.pixels for ready in self._waiting]))
        self._waiting = []
        is_good = np.isfinite(vectors.sum(axis=1))
        for answer, good in zip(answers, is_good, strict=True):
            if good:
                row = len(self._embedded)
                self._embedded.append(dataclasses.replace(answer, row=row))
            else:
                self._failed.append(_without_vector(answer))
        self._vectors.append(vectors[is_good])

    def _stop_if_cancelled(self) -> None:
        if self._cancelled():
            raise RunCancelledError("the batch was cancelled while it was embedded")


def _without_vector(answer: Embedded) -> Failed:
    reason = (
        "the model gave no finite vector for it; look at the picture, or use another model or "
        "other weights"
    )
    return Failed(answer.item_id, FailureKind.MODEL, reason, answer.key, answer.stat)


def _read(item: Item) -> tuple[bytes, FileStat]:
    """The content of a file, read once more where it is not what the scan saw."""
    try:
        data, stat = read_file(item.path)
        if _is_what_was_seen(item, data, image_key(data), by_path=True):
            return data, stat
    except ChangedError:
        pass  # whoever writes to it may be done by now
    return read_file(item.path)


def _is_what_was_seen(item: Item, data: bytes, key: bytes, *, by_path: bool) -> bool:
    """Whether this is the content that the scan saw, as far as the scan could tell."""
    if item.key is not None:
        return item.key == key
    # What comes as bytes comes from the one who scanned.
    return not by_path or item.probe is None or item.probe == probe_of(data)
