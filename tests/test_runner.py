"""A batch goes in, every item comes out once: as a vector, or with the reason why not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.pictures import bomb_png, encoded, jpeg, png, turned, write_bad_files, write_photos
from toolkit.embedding.runner import Runner
from toolkit.embedding.spec import EncoderSpec, Preprocessing
from toolkit.errors import RunCancelledError
from toolkit.images.identity import image_key
from toolkit.records import Batch, FailureKind, FileStat, Item, Outcome

PREPROCESSING = Preprocessing((3, 1, 1), "nearest", (0.0,) * 3, (1.0,) * 3, 1.0, "squash")
SPEC = EncoderSpec(
    "mean_colour", "random", PREPROCESSING, 1, "full", "fp32", "features", None, 0, 3
)


def an_image(rgb: Image.Image | NDArray[np.uint8]) -> Image.Image:
    return rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)


class MeanColour:
    """The smallest encoder there is: the direction of a picture's mean colour."""

    spec = SPEC
    at_once = 4

    def __init__(self) -> None:
        self.n_rows: list[int] = []

    def prepare(self, rgb: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.asarray(an_image(rgb).resize((1, 1), Image.Resampling.BOX))

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.n_rows.append(len(pixels))
        means = pixels.reshape(len(pixels), 3).astype(np.float32)
        with np.errstate(invalid="ignore"):  # Black has no direction.
            rows: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return rows


class Progress:
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, str]] = []

    def __call__(self, item_id: int, stage: str) -> None:
        self.heard.append((item_id, stage))


def never() -> bool:
    return False


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    return encoded(Image.new("RGB", size, colour), "PNG")


RED, GREEN, BLUE = (plain(colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)])


def written(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"{n}.png" for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def a_batch(paths: list[Path], keys: dict[int, bytes] | None = None, batch_id: int = 1) -> Batch:
    items = [
        Item(n, os.fsencode(path), path.stat().st_size if path.exists() else 0, (keys or {}).get(n))
        for n, path in enumerate(paths)
    ]
    return Batch(batch_id, SPEC.fingerprint, tuple(items))


@pytest.fixture
def encoder() -> MeanColour:
    return MeanColour()


@pytest.fixture
def runner(encoder: MeanColour) -> Iterator[Runner]:
    runner = Runner(encoder, decode_threads=2, max_pixels=200_000_000)
    yield runner
    runner.close()


def embed(runner: Runner, batch: Batch) -> Outcome:
    return runner.embed(batch, Progress(), never)


def test_rows_answer_the_items_in_their_order(runner: Runner, tmp_path: Path) -> None:
    paths = written(tmp_path, RED, b"no picture", GREEN, BLUE)

    outcome = embed(runner, a_batch(paths))

    assert (outcome.batch_id, outcome.fingerprint) == (1, SPEC.fingerprint)
    assert [(e.item_id, e.row) for e in outcome.embedded] == [(0, 0), (2, 1), (3, 2)]
    assert outcome.vectors.tolist() == np.eye(3).tolist()
    assert [(f.item_id, f.kind) for f in outcome.failed] == [(1, FailureKind.DECODE)]


def test_an_answer_tells_what_was_read(runner: Runner, tmp_path: Path) -> None:
    # 32 x 16 upright, stored lying.
    data = turned(6)
    (path,) = written(tmp_path, data)

    (answer,) = embed(runner, a_batch([path])).embedded

    assert answer.key == image_key(data)
    assert (answer.width, answer.height, answer.format) == (32, 16, "JPEG")
    assert answer.stat == FileStat.of(os.stat(path))


def test_a_batch_that_is_all_bad_is_answered_in_full(runner: Runner, tmp_path: Path) -> None:
    reasons = write_bad_files(tmp_path)
    paths = [tmp_path / name for name in reasons]

    outcome = embed(runner, a_batch(paths))

    assert outcome.vectors.shape == (0, 3)
    assert [f.item_id for f in outcome.failed] == list(range(len(paths)))
    for failed, (name, word) in zip(outcome.failed, reasons.items(), strict=True):
        assert failed.kind is FailureKind.DECODE
        assert word in failed.reason
        assert failed.key == image_key((tmp_path / name).read_bytes())


def test_a_batch_of_nothing_is_answered(runner: Runner) -> None:
    outcome = embed(runner, a_batch([]))

    assert (outcome.embedded, outcome.failed, outcome.vectors.shape) == ((), (), (0, 3))


def test_a_file_that_is_gone_may_come_back(runner: Runner, tmp_path: Path) -> None:
    (failed,) = embed(runner, a_batch([tmp_path / "gone.png"])).failed

    assert failed.kind is FailureKind.UNREADABLE
    assert failed.key is None
    assert "gone.png" in failed.reason


def test_other_content_than_the_scan_saw_is_no_answer(runner: Runner, tmp_path: Path) -> None:
    paths = written(tmp_path, RED, RED)

    outcome = embed(runner, a_batch(paths, keys={0: image_key(RED), 1: image_key(GREEN)}))

    assert [e.item_id for e in outcome.embedded] == [0]
    (failed,) = outcome.failed
    assert (failed.item_id, failed.kind) == (1, FailureKind.CHANGED)
    assert "changed while being read" in failed.reason


def test_bytes_stand_for_a_file_that_is_elsewhere(runner: Runner, tmp_path: Path) -> None:
    (here,) = written(tmp_path, RED)
    batch = a_batch([here, tmp_path / "elsewhere.png"])

    outcome = runner.embed(batch, Progress(), never, blobs={1: GREEN})

    assert outcome.vectors.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert outcome.embedded[0].stat is not None
    assert outcome.embedded[1].stat is None


def test_a_picture_without_a_direction_fails_alone(runner: Runner, tmp_path: Path) -> None:
    paths = written(tmp_path, RED, plain((0, 0, 0)), GREEN)

    outcome = embed(runner, a_batch(paths))

    assert [(e.item_id, e.row) for e in outcome.embedded] == [(0, 0), (2, 1)]
    assert np.isfinite(outcome.vectors).all()
    (failed,) = outcome.failed
    assert failed.item_id == 1
    # Another model may have a vector for the same bytes.
    assert not failed.kind.is_permanent
    assert failed.kind is FailureKind.MODEL
    assert "no finite vector" in failed.reason


def test_the_model_gets_as_many_as_it_likes_at_once(
    runner: Runner, encoder: MeanColour, tmp_path: Path
) -> None:
    paths = written(tmp_path, RED, b"bad", RED, RED, RED, RED, RED)

    embed(runner, a_batch(paths))

    assert encoder.n_rows == [4, 2]


def test_an_item_is_stamped_before_and_after_it_is_decoded(runner: Runner, tmp_path: Path) -> None:
    progress = Progress()
    paths = [*written(tmp_path, RED, b"bad"), tmp_path / "gone.png"]

    runner.embed(a_batch(paths), progress, never)

    for item_id in range(3):
        mine = [stage for heard, stage in progress.heard if heard == item_id and stage != "encode"]
        assert mine == ["start", "done"]
    assert [heard for heard in progress.heard if heard[1] == "encode"] == [(0, "encode")]


def test_a_prefetched_batch_is_decoded_once(runner: Runner, tmp_path: Path) -> None:
    batch = a_batch(written(tmp_path, RED, GREEN))
    progress = Progress()
    runner.prefetch(batch, progress)

    outcome = runner.embed(batch, progress, never)

    assert outcome.vectors.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert sorted(progress.heard) == sorted(
        [(0, "start"), (0, "done"), (1, "start"), (1, "done"), (0, "encode")]
    )


def test_decoding_runs_no_more_than_two_batches_ahead(runner: Runner, tmp_path: Path) -> None:
    paths = written(tmp_path, RED)
    batches = [a_batch(paths, batch_id=n) for n in range(4)]
    heard = [Progress() for _ in batches]
    for batch, progress in zip(batches, heard, strict=True):
        runner.prefetch(batch, progress)

    for batch in batches[:2]:
        embed(runner, batch)

    assert [len(progress.heard) for progress in heard] == [2, 2, 0, 0]


def test_a_cancelled_batch_ends_before_the_model_runs(
    runner: Runner, encoder: MeanColour, tmp_path: Path
) -> None:
    batch = a_batch(written(tmp_path, RED))

    with pytest.raises(RunCancelledError):
        runner.embed(batch, Progress(), lambda: True)

    assert encoder.n_rows == []


def test_a_cancelled_batch_does_not_wait_for_what_hangs(runner: Runner, tmp_path: Path) -> None:
    # The first item's stamp blocks, as a file on a dead server would.
    released = threading.Event()

    def hanging(item_id: int, stage: str) -> None:
        released.wait(60)

    batch = a_batch(written(tmp_path, RED))

    with pytest.raises(RunCancelledError):
        runner.embed(batch, hanging, lambda: True)

    released.set()


def test_a_failing_model_is_not_the_pictures_fault(tmp_path: Path) -> None:
    class Broken(MeanColour):
        def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            raise RuntimeError("out of luck")

    broken = Runner(Broken(), decode_threads=1, max_pixels=100)

    with pytest.raises(RuntimeError, match="out of luck"):
        embed(broken, a_batch(written(tmp_path, RED)))

    broken.close()


@pytest.mark.parametrize(
    ("decode", "input_size", "crop_pct", "seen"),
    [
        ("full", (3, 16, 16), 1.0, (96, 64)),
        ("reduced", (3, 16, 16), 1.0, (24, 16)),
        ("reduced", (3, 32, 32), 1.0, (48, 32)),
        ("reduced", (3, 33, 33), 1.0, (96, 64)),
        # 28 is cropped out of 32, and 29 out of 33.
        ("reduced", (3, 28, 28), 0.875, (48, 32)),
        ("reduced", (3, 29, 29), 0.875, (96, 64)),
        # Either edge of the input may be the longer one.
        ("reduced", (3, 33, 20), 1.0, (96, 64)),
        ("reduced", (3, 20, 33), 1.0, (96, 64)),
    ],
)
def test_only_a_reduced_encoder_is_given_less_and_never_too_little(
    decode: str,
    input_size: tuple[int, int, int],
    crop_pct: float,
    seen: tuple[int, int],
    tmp_path: Path,
) -> None:
    class Watching(MeanColour):
        spec = dataclasses.replace(
            SPEC,
            decode=decode,
            preprocessing=dataclasses.replace(
                PREPROCESSING, input_size=input_size, crop_pct=crop_pct
            ),
        )

        def prepare(self, rgb: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
            sizes.append(an_image(rgb).size)
            return super().prepare(rgb)

    sizes: list[tuple[int, int]] = []
    paths = written(tmp_path, jpeg((96, 64)), png((96, 64)))
    runner = Runner(Watching(), decode_threads=1, max_pixels=96 * 64)

    answers = embed(runner, a_batch(paths)).embedded
    runner.close()

    assert sizes == [seen, (96, 64)]
    assert [(a.width, a.height) for a in answers] == [(96, 64)] * 2


def test_the_limit_of_pixels_holds_on_either_side_of_large(tmp_path: Path) -> None:
    paths = written(tmp_path, plain((255, 0, 0), (10, 10)), png((11, 10)), bomb_png(60))
    small = Runner(MeanColour(), decode_threads=2, max_pixels=100)
    large = Runner(MeanColour(), decode_threads=2, max_pixels=59_000_000)

    refused_by_small = [f.item_id for f in embed(small, a_batch(paths)).failed]
    refused_by_large = [f.item_id for f in embed(large, a_batch(paths)).failed]

    assert refused_by_small == [1, 2]
    assert refused_by_large == [2]
    small.close()
    large.close()


def test_a_large_picture_is_not_kept_out_for_its_size(tmp_path: Path) -> None:
    # 51 megapixels, black: more than go beside others, fewer than the limit.
    paths = written(tmp_path, RED, bomb_png(51, whole=True), GREEN)
    runner = Runner(MeanColour(), decode_threads=2, max_pixels=200_000_000)

    outcome = embed(runner, a_batch(paths))

    assert [e.item_id for e in outcome.embedded] == [0, 2]
    (failed,) = outcome.failed
    assert "no finite vector" in failed.reason
    runner.close()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux for the peak")
def test_two_huge_pictures_are_never_in_memory_at_once(tmp_path: Path) -> None:
    # 200 megapixels each: one takes 1.0 GB for a moment, as RGB beside its 8-bit form.
    written(tmp_path, bomb_png(200, whole=True), bomb_png(200, whole=True) + b"\0")
    code = (
        "import re, sys; from pathlib import Path\n"
        "from tests.test_runner import MeanColour, Runner, a_batch, embed\n"
        "runner = Runner(MeanColour(), decode_threads=2, max_pixels=200_000_000)\n"
        "outcome = embed(runner, a_batch(sorted(Path(sys.argv[1]).glob('*.png'))))\n"
        "assert ['no finite vector' in f.reason for f in outcome.failed] == [True, True]\n"
        # Not ru_maxrss: a process inherits that of whoever started it.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    root = Path(__file__).parent.parent

    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert int(out) * 1024 < 1.4e9


@pytest.mark.slow
def test_the_real_encoder_gives_the_same_bytes_for_any_cut(tmp_path: Path) -> None:
    from toolkit.embedding.loading import load_encoder
    from toolkit.embedding.spec import EncoderRequest

    request = EncoderRequest("test_vit", pretrained=False)
    encoder = load_encoder(request, data_dir=tmp_path, device="cpu", threads=2)
    paths = write_photos(tmp_path, 9)
    runner = Runner(encoder, decode_threads=2, max_pixels=10**6)

    whole = embed(runner, a_batch(paths)).vectors
    again = embed(runner, a_batch(paths)).vectors
    pieces = [embed(runner, a_batch(paths[n : n + 2])).vectors for n in range(0, 9, 2)]
    cut = np.concatenate(pieces)
    direct = encoder.encode(np.stack([encoder.prepare(Image.open(path)) for path in paths]))
    runner.close()

    assert whole.tobytes() == again.tobytes() == cut.tobytes() == direct.tobytes()
