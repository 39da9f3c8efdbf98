"""The embedding child: one process that turns pictures into vectors for its parent.

Law: it lives in its own session, so an Interrupt does not reach it; it ends when its parent
does, or when nothing was asked of it for as long as its parent said. Its parent may kill it at any
moment and loses no more than what was in flight.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from toolkit.dispatch.wire import read_frame, write_frame
from toolkit.embedding.runner import Runner
from toolkit.embedding.spec import EncoderRequest
from toolkit.errors import ToolkitError
from toolkit.images import resample
from toolkit.records import Batch

if TYPE_CHECKING:
    from toolkit.embedding.encoder import Encoder


class _Child:
    def __init__(self, questions: IO[bytes], answers: IO[bytes]) -> None:
        self._questions, self._answers = questions, answers
        self._writing = threading.Lock()
        self._to_load: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._batches: queue.SimpleQueue[tuple[Batch, dict[int, bytes]]] = queue.SimpleQueue()
        self._runner: Runner | None = None
        # The parent has stored what it was given: the next batch may be computed.
        self._stored = threading.Semaphore(1)

    def main(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        question = self._to_load.get()
        threads, max_pixels = question["threads"], question["max_pixels"]
        idle_exit_s = question["idle_exit_s"]
        try:
            encoder = _load(question)
        except ToolkitError as error:
            args = list(error.args)
            self._say({"type": "error", "class": type(error).__name__, "args": args})
            return
        runner = self._runner = Runner(encoder, decode_threads=threads, max_pixels=max_pixels)
        ready = {
            "type": "ready",
            "spec": encoder.spec.to_json(),
            "device": encoder.model.device,
            "engine": encoder.model.engine,
        }
        self._say(ready, encoder.golden.astype("<f4").tobytes())
        if question["engine_dir"]:
            # Behind the first pictures, which Pillow resizes to the same pixels.
            kernels = Path(question["engine_dir"]) / "kernels"
            threading.Thread(target=resample.load, args=(kernels,), daemon=True).start()
        while True:
            try:
                batch, blobs = self._batches.get(timeout=idle_exit_s)
            except queue.Empty:
                return
            self._stored.acquire()
            outcome = runner.embed(batch, self._progress, lambda: False, blobs=blobs)
            self._say({"type": "outcome", **outcome.to_json()}, outcome.blob())

    def _listen(self) -> None:
        """Read questions while the model loads and runs, so that decoding runs ahead of it."""
        try:
            self._serve_questions()
        finally:
            # The parent is gone, wants us gone, or says what we cannot read: a model that loads
            # for minutes or a decoder that hangs must not keep us.
            os._exit(0)

    def _serve_questions(self) -> None:
        while (frame := read_frame(self._questions)) is not None:
            question, blobs = frame
            match question["type"]:
                case "load":
                    self._to_load.put(question)
                case "stored":
                    self._stored.release()
                case "batch":
                    batch = Batch.from_json(question["batch"])
                    given = dict(zip(question["blob_ids"], blobs, strict=True))
                    if self._runner is not None:
                        self._runner.max_pixels = question["max_pixels"]
                        self._runner.prefetch(batch, self._progress, blobs=given)
                    self._batches.put((batch, given))

    def _progress(self, item_id: int, stage: str) -> None:
        self._say({"type": "stamp", "item": item_id, "stage": stage})

    def _say(self, head: dict[str, Any], *blobs: bytes) -> None:
        with self._writing:
            write_frame(self._answers, head, blobs)


def _load(question: dict[str, Any]) -> Encoder:
    # Deferred: the parent learns of a missing torch through a frame, not a traceback.
    from toolkit.embedding.loading import load_encoder

    folder = question["engine_dir"]
    return load_encoder(
        EncoderRequest.from_json(question["request"]),
        data_dir=Path(question["data_dir"]),
        device=question["device"],
        engine_dir=Path(folder) if folder else None,
        threads=question["threads"],
        batch_size=question["batch_size"],
        crashes=question["crashes"],
    )


def main() -> None:
    """Serve one parent over stdin and stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints goes to the log, not between two frames.
    os.dup2(2, 1)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _Child(sys.stdin.buffer, answers).main()
    except BrokenPipeError:
        # The parent is gone; there is nobody to tell.
        os._exit(0)


if __name__ == "__main__":
    main()
