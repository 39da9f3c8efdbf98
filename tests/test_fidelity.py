"""Encoders that are faster and not exact: how near they stay, and how a build tells of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import toolkit as tk
from tests.pictures import encoded, jpeg, texture, write_photos
from tests.support import build
from toolkit import config, fidelity
from toolkit.catalog import open_catalog, transaction
from toolkit.config import Settings
from toolkit.dispatch import local
from toolkit.dispatch.local import close_warm, warm_executor
from toolkit.driver import Build
from toolkit.embedding.encoder import Encoder
from toolkit.embedding.loading import load_encoder
from toolkit.embedding.preprocess import golden_pictures
from toolkit.embedding.spec import EncoderRequest, EncoderSpec, Preprocessing
from toolkit.embedding.store import VectorStore, segment_folder
from toolkit.embedding.torch_model import TorchModel
from toolkit.errors import IndexConflictError
from toolkit.fidelity import SAMPLE, Fidelity, Sample
from toolkit.images.identity import image_key
from toolkit.records import Batch, Embedded, Failed, FailureKind, Item, Outcome

TINY = EncoderRequest("test_vit", pretrained=False)
FAST = dataclasses.replace(TINY, precision="bf16", decode="reduced")
FAST_OPTIONS = {"precision": "bf16", "decode": "reduced"}

# --- torch in bf16 ----------------------------------------------------------------------------


def load_torch(request: EncoderRequest, tmp_path: Path) -> Encoder:
    return load_encoder(request, data_dir=tmp_path, device="cpu", threads=2)


def vectors_of(encoder: Encoder) -> NDArray[np.float32]:
    pictures = [*golden_pictures(), texture((300, 70)), texture((40, 500))]
    return encoder.encode(np.stack([encoder.prepare(picture) for picture in pictures]))


@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet"])
def test_bf16_moves_the_vectors_a_little(model: str, tmp_path: Path) -> None:
    exact = vectors_of(load_torch(EncoderRequest(model, pretrained=False), tmp_path))
    request = EncoderRequest(model, pretrained=False, precision="bf16")

    encoder = load_torch(request, tmp_path)
    vectors = vectors_of(encoder)

    assert (encoder.model.engine, vectors.dtype) == ("torch", np.float32)
    assert float((exact * vectors).sum(axis=1).min()) >= 0.9
    # By software where the processor has no bf16.
    assert np.abs(exact - vectors).max() > 1e-4
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() < 1e-6


def test_precision_and_decode_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    modes = itertools.product(("fp32", "bf16"), ("full", "reduced"))
    requests = [dataclasses.replace(TINY, precision=p, decode=d) for p, d in modes]

    specs = [load_torch(request, tmp_path).spec for request in requests]

    assert len({spec.fingerprint for spec in specs}) == 4
    assert [spec.is_exact for spec in specs] == [True, False, False, False]
    assert [(spec.precision, spec.decode) for spec in specs] == [
        (request.precision, request.decode) for request in requests
    ]
    # Nothing else sets them apart.
    assert {dataclasses.replace(spec, precision="fp32", decode="full") for spec in specs} == {
        specs[0]
    }


# --- out of memory ----------------------------------------------------------------------------


class _Cramped(torch.nn.Module):
    """Mean colours, on a device that has room for so many pictures at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.sizes: list[int] = []
        self.refused: list[weakref.ref[torch.Tensor]] = []
        #: What earlier runs had in memory when they were refused, and have still.
        self.n_held: list[int] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.n_held.append(sum(ref() is not None for ref in self.refused))
        self.sizes.append(len(pixels))
        activations = pixels.float()
        if len(pixels) > self.room:
            self.refused.append(weakref.ref(activations))
            raise torch.OutOfMemoryError(f"no room for {len(pixels)}")
        return activations.mean(dim=(1, 2))


def cramped(room: int, lanes: int = 1) -> tuple[Encoder, _Cramped]:
    """An encoder of batches of 8."""
    how = Preprocessing((3, 4, 4), "bilinear", (0.0,) * 3, (1.0,) * 3, 1.0, "squash")
    spec = EncoderSpec("mean", "random", how, 1, "full", "fp32", "features", None, 0, 3)
    network = _Cramped(room=8)
    encoder = Encoder(spec, TorchModel(network, "cpu", lanes, batch_size=8))
    network.room = room
    network.sizes.clear()
    network.n_held.clear()
    return encoder, network


def some_pixels(n: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 256, (n, 4, 4, 3), np.uint8)


def directions(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The vectors of :class:`_Cramped`, by hand."""
    colours = pixels.astype(np.float64).mean(axis=(1, 2))
    out: NDArray[np.float64] = colours / np.linalg.norm(colours, axis=1, keepdims=True)
    return out


@pytest.mark.parametrize(
    ("room", "sizes"), [(8, [8]), (7, [8, 4]), (4, [8, 4]), (2, [8, 4, 2]), (1, [8, 4, 2, 1])]
)
def test_out_of_memory_halves_the_batch_and_gives_the_right_vectors(
    room: int, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    encoder, network = cramped(room)
    pixels = some_pixels(17)

    vectors = encoder.encode(pixels)

    # Several of one size may be refused before the first refusal is heard of.
    assert [size for size, _ in itertools.groupby(network.sizes)] == sizes
    assert np.abs(vectors - directions(pixels)).max() < 1e-6
    assert encoder.at_once == sizes[-1]
    assert [record.getMessage() for record in caplog.records] == [
        f"cpu is out of memory; now {size} at once" for size in sizes[1:]
    ]


def test_a_batch_that_was_halved_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    encoder, network = cramped(room=4)
    encoder.encode(some_pixels(8))
    network.sizes.clear()

    encoder.encode(some_pixels(8))

    assert network.sizes == [4, 4]
    assert caplog.text.count("out of memory") == 1


def test_lanes_that_run_out_of_memory_together_lose_nothing() -> None:
    encoder, _ = cramped(room=3, lanes=4)
    pixels = some_pixels(101)

    vectors = encoder.encode(pixels)

    assert np.abs(vectors - directions(pixels)).max() < 1e-6
    assert encoder.micro_batch == 2


def test_what_did_not_fit_is_out_of_memory_before_less_is_tried() -> None:
    encoder, network = cramped(room=1)

    encoder.encode(some_pixels(1))

    assert network.sizes == [8, 4, 2, 1]
    assert network.n_held == [0, 0, 0, 0]


def test_one_picture_that_does_not_fit_is_an_error_with_its_cause() -> None:
    encoder, network = cramped(room=0)

    with pytest.raises(MemoryError, match="no room for 1"):
        encoder.encode(some_pixels(1))

    assert network.sizes == [8, 4, 2, 1]
    # Another time there may be room.
    network.room = 1
    assert np.abs(encoder.encode(some_pixels(3)) - directions(some_pixels(3))).max() < 1e-6


def test_an_encoder_that_is_loaded_on_a_cramped_device_is_halved_at_once() -> None:
    how = Preprocessing((3, 4, 4), "bilinear", (0.0,) * 3, (1.0,) * 3, 1.0, "squash")
    spec = EncoderSpec("mean", "random", how, 1, "full", "fp32", "features", None, 0, 3)

    encoder = Encoder(spec, TorchModel(_Cramped(room=2), "cpu", 1, batch_size=64))

    assert (encoder.at_once, encoder.golden.shape) == (2, (4, 3))
    assert np.isfinite(encoder.golden).all()


# --- which images are compared ----------------------------------------------------------------


def an_item(n: int) -> Item:
    return Item(n, b"/photos/%d.jpg" % n, 1, image_key(b"%d" % n))


def an_outcome(ids: list[int], failed: tuple[int, ...] = ()) -> Outcome:
    """Each vector says whose it is."""
    good = [n for n in ids if n not in failed]
    embedded = tuple(
        Embedded(n, image_key(b"%d" % n), row, 8, 8, "JPEG") for row, n in enumerate(good)
    )
    lost = tuple(Failed(n, FailureKind.DECODE, "it is damaged") for n in failed)
    vectors = np.array([[n, 1] for n in good], np.float32).reshape(-1, 2)
    return Outcome(1, "f", embedded, lost, vectors, 0.0)


def offered(n: int, sample: Sample | None = None) -> Sample:
    sample = sample or Sample()
    for number in range(n):
        sample.offer(an_item(number))
    return sample


@pytest.mark.parametrize("n", [0, 1, 10, SAMPLE])
def test_all_of_a_few_images_are_in_the_sample(n: int) -> None:
    assert list(offered(n)._items) == list(range(n))


def test_every_image_has_the_same_chance() -> None:
    n_images, n_draws = 640, 400
    counts = np.zeros(n_images)

    for seed in range(n_draws):
        sample = Sample()
        sample._random = random.Random(seed)
        taken = list(offered(n_images, sample)._items)
        assert len(set(taken)) == SAMPLE
        counts[taken] += 1

    # Each is taken in a fifth of the draws: 80 of 400, with a deviation of 8.
    assert abs(counts - 80).max() < 5 * 8
    # Early and late ones alike: a tenth of the images is taken 5,120 times, deviation 64.
    tenths = counts.reshape(10, -1).sum(axis=1)
    assert abs(tenths - 5120).max() < 4 * 64


def test_what_is_sampled_depends_on_the_order_alone() -> None:
    one, two, more = offered(1000), offered(1000), offered(1001)

    assert list(one._items) == list(two._items)
    assert list(one._items) != list(range(SAMPLE))
    assert len(set(one._items) ^ set(more._items)) in (0, 2)


def test_only_what_was_offered_and_embedded_has_a_vector() -> None:
    sample = offered(4)

    sample.saw(an_outcome([0, 1, 2, 99], failed=(1,)))

    assert {n: vector.tolist() for n, vector in sample._vectors.items()} == {
        0: [0, 1],
        2: [2, 1],
    }


def test_an_image_is_known_by_the_content_that_was_embedded() -> None:
    sample = Sample()
    for n in (0, 1):
        sample.offer(dataclasses.replace(an_item(n), key=None))

    sample.saw(an_outcome([1]))

    assert [item.key for item in sample._items.values()] == [None, image_key(b"1")]


def test_an_image_that_left_the_sample_leaves_no_vector() -> None:
    sample = offered(SAMPLE)
    sample.saw(an_outcome(list(range(SAMPLE))))

    for n in range(SAMPLE, 2000):
        sample.offer(an_item(n))
        sample.saw(an_outcome([n]))

    assert len(sample._items) == SAMPLE
    assert set(sample._vectors) == set(sample._items)
    assert all(vector.tolist() == [n, 1] for n, vector in sample._vectors.items())


def test_a_sample_keeps_no_batch_in_memory() -> None:
    sample, outcome = offered(2), an_outcome([0, 1])
    sample.saw(outcome)

    outcome.vectors[:] = 7

    assert [vector.tolist() for vector in sample._vectors.values()] == [[0, 1], [1, 1]]


def test_an_image_that_comes_again_takes_nobodys_place() -> None:
    # A file that changed under the build is embedded once more, with what is known of it now.
    sample = offered(SAMPLE)
    changed = [dataclasses.replace(an_item(n), key=b"new") for n in range(SAMPLE)]

    for _ in range(20):
        for item in changed:
            sample.offer(item)

    assert list(sample._items.values()) == changed


# --- measuring --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Known:
    """Photos, and the vectors that the exact encoder gives for them; the store has none."""

    settings: Settings
    spec: EncoderSpec
    items: tuple[Item, ...]
    vectors: NDArray[np.float32]

    def sample(self, vectors: NDArray[np.float32]) -> Sample:
        """As if a build had given the first photos these vectors."""
        sample = Sample()
        for item in self.items[: len(vectors)]:
            sample.offer(item)
        embedded = tuple(
            Embedded(item.id, item.key or b"", row, 64, 48, "JPEG")
            for row, item in enumerate(self.items[: len(vectors)])
        )
        sample.saw(Outcome(1, "f", embedded, (), vectors, 0.0))
        return sample

    def measure(
        self, sample: Sample, catalog: sqlite3.Connection, request: EncoderRequest = FAST
    ) -> Fidelity | None:
        return sample.measure(request, self.settings, catalog, "run")

    def stored(self, catalog: sqlite3.Connection) -> set[int]:
        """The photos of which the store has the exact vector."""
        store = VectorStore(catalog, self.settings.data_dir, self.spec)
        return {item.id for item in self.items if item.key and store.has([item.key])}

    def n_files(self) -> int:
        """Segments of exact vectors: each measure that embeds leaves one."""
        folder = segment_folder(self.settings.data_dir, self.spec.fingerprint)
        return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("known")
    settings = config.resolve(data_dir=folder / "data")
    items = tuple(
        Item(n, os.fsencode(path), path.stat().st_size, image_key(path.read_bytes()))
        for n, path in enumerate(write_photos(folder / "photos", 14))
    )
    with warm_executor(TINY, settings) as executor:
        spec = executor.start()
        vectors = executor.embed(Batch(0, spec.fingerprint, items), {}).vectors
    return Known(settings, spec, items, vectors)


@pytest.fixture
def catalog(known: Known) -> Iterator[sqlite3.Connection]:
    """The catalog of the photos' data folder, with nothing stored."""
    with contextlib.closing(open_catalog(known.settings.data_dir)) as catalog:
        yield catalog
        with transaction(catalog):
            for table in ("vectors", "segments", "images"):
                catalog.execute(f"DELETE FROM {table}")
    shutil.rmtree(known.settings.data_dir / "vectors", ignore_errors=True)


@pytest.fixture
def photos(known: Known) -> Iterator[list[Path]]:
    """The photos, which are put back afterwards."""
    paths = [Path(os.fsdecode(item.path)) for item in known.items]
    before = [path.read_bytes() for path in paths]
    yield paths
    for path, content in zip(paths, before, strict=True):
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 10, 11, 14])
def test_exact_vectors_are_found_to_be_exact(
    known: Known, catalog: sqlite3.Connection, n: int
) -> None:
    found = known.measure(known.sample(known.vectors[:n]), catalog)

    assert found is not None
    assert found == Fidelity(n, pytest.approx(1), pytest.approx(1), 1.0)


@pytest.mark.slow
def test_cosines_are_to_the_exact_vector_of_the_same_image(
    known: Known, catalog: sqlite3.Connection
) -> None:
    turned = known.vectors.copy()
    turned[3] *= -1

    found = known.measure(known.sample(turned), catalog)

    assert found is not None
    # 13 of 14 have the cosine 1, one has -1.
    assert found.mean_cosine == pytest.approx(12 / 14)
    assert found.min_cosine == pytest.approx(-1)
    assert found.top10_overlap < 1


@pytest.mark.slow
def test_neighbours_are_those_within_the_sample(known: Known, catalog: sqlite3.Connection) -> None:
    # What is turned as a whole has every neighbour that it had.
    found = known.measure(known.sample(-known.vectors), catalog)

    assert found == Fidelity(14, pytest.approx(-1), pytest.approx(-1), 1.0)


@pytest.mark.slow
def test_images_that_are_gone_or_changed_are_left_out(
    known: Known, catalog: sqlite3.Connection, photos: list[Path]
) -> None:
    sample = known.sample(known.vectors)
    photos[2].unlink()
    photos[5].write_bytes(jpeg(seed=5000))
    photos[7].write_bytes(b"no picture any more")

    found = known.measure(sample, catalog)

    assert found == Fidelity(11, pytest.approx(1), pytest.approx(1), 1.0)
    assert known.stored(catalog) == set(range(14)) - {2, 5, 7}
    # Each had a vector: that it is no picture is for a build to say.
    assert catalog.execute("SELECT count(*) FROM failures").fetchone() == (0,)


@pytest.mark.slow
def test_where_every_image_is_gone_nothing_is_measured(
    known: Known, catalog: sqlite3.Connection, photos: list[Path]
) -> None:
    sample = known.sample(known.vectors[:2])
    for path in photos[:2]:
        path.unlink()

    assert known.measure(sample, catalog) is None
    assert known.n_files() == 0


@pytest.mark.slow
def test_what_is_stored_is_not_embedded_again(
    known: Known, catalog: sqlite3.Connection, photos: list[Path]
) -> None:
    known.measure(known.sample(known.vectors), catalog)
    close_warm()
    for path in photos:
        path.unlink()

    found = known.measure(known.sample(-known.vectors), catalog)

    assert found == Fidelity(14, pytest.approx(-1), pytest.approx(-1), 1.0)
    # No model was loaded for it.
    assert not local._warm
    assert known.n_files() == 1


@pytest.mark.slow
def test_only_what_the_store_lacks_is_embedded(
    known: Known, catalog: sqlite3.Connection, photos: list[Path]
) -> None:
    known.measure(known.sample(known.vectors[:9]), catalog)
    for path in photos[:9]:
        path.unlink()

    found = known.measure(known.sample(known.vectors), catalog)

    assert found == Fidelity(14, pytest.approx(1), pytest.approx(1), 1.0)
    assert known.stored(catalog) == set(range(14))
    sizes = [
        size for (size,) in catalog.execute("SELECT count(*) FROM vectors GROUP BY segment_id")
    ]
    assert sorted(sizes) == [5, 9]


def test_where_nothing_was_embedded_no_process_is_started(settings: Settings) -> None:
    sample = offered(5)
    sample.saw(an_outcome([0, 1, 2, 3, 4], failed=(0, 1, 2, 3, 4)))

    with contextlib.closing(open_catalog(settings.data_dir)) as catalog:
        assert sample.measure(FAST, settings, catalog, "run") is None
    assert not (settings.data_dir / "logs").exists()


def reason_told(caplog: pytest.LogCaptureFixture) -> str:
    """Why nothing was measured, as the one warning has it."""
    (record,) = [r for r in caplog.records if r.name == fidelity.__name__]
    assert record.levelname == "WARNING"
    assert "how exact the vectors are was not measured" in record.getMessage()
    return record.getMessage()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "test_vitt"}, "test_vitt"),
        ({"checkpoint_path": "/nowhere/w.safetensors"}, "/nowhere/w.safetensors"),
    ],
    ids=str,
)
def test_an_exact_encoder_that_cannot_be_loaded_costs_the_measure_alone(
    known: Known,
    catalog: sqlite3.Connection,
    changes: dict[str, Any],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = dataclasses.replace(FAST, **changes)

    assert known.measure(known.sample(known.vectors), catalog, request) is None
    assert words in reason_told(caplog)


@pytest.mark.slow
def test_exact_vectors_that_cannot_be_stored_cost_the_measure_alone(
    known: Known, catalog: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    # A file where the folder of segments belongs.
    (known.settings.data_dir / "vectors").touch()

    found = known.measure(known.sample(known.vectors), catalog)

    (known.settings.data_dir / "vectors").unlink()
    assert found is None
    assert "cannot write" in reason_told(caplog)
    assert known.stored(catalog) == set()


def gone(segment: Path) -> None:
    segment.unlink()


def cut_short(segment: Path) -> None:
    os.truncate(segment, 100)


def no_file(segment: Path) -> None:
    segment.unlink()
    segment.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [gone, cut_short, no_file])
def test_exact_vectors_that_cannot_be_read_cost_the_measure_alone(
    known: Known,
    catalog: sqlite3.Connection,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    known.measure(known.sample(known.vectors), catalog)
    (segment,) = (known.settings.data_dir / "vectors").glob("*/*.f32")
    damage(segment)

    assert known.measure(known.sample(known.vectors), catalog) is None
    assert segment.name in reason_told(caplog)


def test_words_name_what_was_measured_and_nothing_that_was_not() -> None:
    many = str(Fidelity(40, 0.99987, 0.98765, 0.955))
    few, one = str(Fidelity(11, 0.5, 0.25, 1.0)), str(Fidelity(1, 0.5, 0.5, 1.0))

    assert many == (
        "against exact vectors, 40 images: cosine 0.9999 in the mean, 0.9877 at least; "
        "96% of the 10 nearest the same"
    )
    # The 10 nearest of 11 are all the others, by any vectors.
    assert few == "against exact vectors, 11 images: cosine 0.5000 in the mean, 0.2500 at least"
    assert one == "against exact vectors, 1 image: cosine 0.5000 in the mean, 0.5000 at least"


# --- whole builds -----------------------------------------------------------------------------

N_PHOTOS = 40

#: The model's input is 160 cropped out of 168: decoded at a half, these still have more.
PHOTO_SIZE = (420, 350)


def write_mosaics(folder: Path, n: int) -> None:
    """Coloured squares of 2 to 5 pixels: what is left of them at a half is not the same."""
    width, height = PHOTO_SIZE
    folder.mkdir()
    for number in range(n):
        rng = np.random.default_rng(number)
        edge = int(rng.integers(2, 6))
        squares = rng.integers(0, 256, (height // edge + 1, width // edge + 1, 3), np.uint8)
        pixels = squares.repeat(edge, axis=0).repeat(edge, axis=1)[:height, :width]
        data = encoded(Image.fromarray(pixels), "JPEG", quality=90)
        (folder / f"photo_{number:04d}.jpg").write_bytes(data)


@dataclasses.dataclass(frozen=True)
class Built:
    """A data folder in which an index of photos was built the fast way."""

    photos: Path
    run_id: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    write_mosaics(folder / "photos", N_PHOTOS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_DATA_DIR", str(folder / "data"))
        run = build(folder / "photos", name="fast", distributed=False, **FAST_OPTIONS)
    return Built(folder / "photos", run.run_id)


@pytest.fixture
def fast(built: Built) -> Build:
    """The run, with this test in its data folder."""
    tk.configure(data_dir=built.photos.parent / "data")
    return tk.attach(built.run_id)


def exact_usage() -> list[dict[str, Any]]:
    """What the store says of exact vectors, bytes that no vector needs included."""
    with contextlib.closing(open_catalog(config.resolve().data_dir)) as catalog:
        specs = dict(catalog.execute("SELECT fingerprint, spec FROM encoders"))
    exact = {f for f, spec in specs.items() if EncoderSpec.from_json(json.loads(spec)).is_exact}
    return [row for row in tk.store_usage() if row["fingerprint"] in exact]


def events_of(run: Build) -> list[dict[str, Any]]:
    return [event for event in run._view.events() if event["event"] == "fidelity"]


@pytest.mark.slow
def test_a_fast_build_tells_how_far_it_moved_the_vectors(fast: Build) -> None:
    words = fast.record.fidelity
    (event,) = events_of(fast)

    assert (fast.state, fast.accounting.embedded) == ("done", N_PHOTOS)
    assert words is not None
    assert words.startswith("against exact vectors, 40 images: cosine 0.9")
    assert words in repr(fast)
    assert words in fast._repr_html_()
    assert fast.record.summary()["fidelity"] == words
    measured = Fidelity(*(event[field.name] for field in dataclasses.fields(Fidelity)))
    assert str(measured) == words
    assert measured.n == N_PHOTOS
    assert 0.9 < measured.min_cosine < measured.mean_cosine < 0.9999
    assert 0.5 < measured.top10_overlap < 1


@pytest.mark.slow
def test_what_it_tells_is_what_an_exact_index_of_the_same_photos_shows(
    fast: Build, built: Built, tmp_path: Path
) -> None:
    (event,) = events_of(fast)
    # Of its own: with the vectors that were measured against it would agree in any case.
    tk.configure(data_dir=tmp_path / "other")

    exact = build(built.photos, name="exact", distributed=False, dtype="f32")

    assert exact.accounting.embedded == N_PHOTOS
    with fast.index as moved, exact.index as right:
        assert moved.to_pandas()["path"].tolist() == right.to_pandas()["path"].tolist()
        cosines = (np.asarray(moved.vectors, np.float64) * right.vectors).sum(axis=1)
        overlap = tk.compare(moved, right, k=10)["neighbour_overlap"]
    assert event["mean_cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert event["min_cosine"] == pytest.approx(cosines.min(), abs=1e-6)
    assert event["top10_overlap"] == pytest.approx(overlap)
    # There is nothing to tell of exact vectors.
    assert (exact.record.fidelity, events_of(exact)) == (None, [])
    assert "exact vectors" not in repr(exact) + exact._repr_html_()


@pytest.mark.slow
def test_an_index_of_reduced_pictures_keeps_the_sizes_of_the_whole(fast: Build) -> None:
    with fast.index as index:
        table = index.to_pandas()
        encoder, words = index.encoder, repr(index)

    assert set(zip(table["width"], table["height"], strict=True)) == {PHOTO_SIZE}
    assert (encoder.precision, encoder.decode) == ("bf16", "reduced")
    assert "not exact: bf16 and reduced decoding" in words


@pytest.mark.slow
def test_a_second_build_embeds_nothing_and_measures_nothing(fast: Build, built: Built) -> None:
    close_warm()

    again = build(built.photos, name="fast", distributed=False, **FAST_OPTIONS)

    assert (again.state, again.accounting.embedded) == ("done", 0)
    assert (again.record.fidelity, events_of(again)) == (None, [])
    # No model was loaded for it.
    assert not local._warm
    # What was told before stays told.
    assert fast.record.fidelity is not None


@pytest.mark.slow
def test_only_what_a_build_embedded_is_measured(fast: Build, built: Built, tmp_path: Path) -> None:
    more = tmp_path / "more"
    write_mosaics(more, N_PHOTOS + 1)

    run = build(more, name="more", distributed=False, **FAST_OPTIONS)

    (event,) = events_of(run)
    assert (run.accounting.embedded, run.accounting.reused, event["n"]) == (1, N_PHOTOS, 1)
    assert str(run.record.fidelity).startswith("against exact vectors, 1 image: cosine 0.9")


@pytest.mark.slow
def test_an_exact_build_takes_over_the_vectors_that_were_measured_against(
    fast: Build, built: Built
) -> None:
    exact = build(built.photos, name="exact", distributed=False)

    assert (exact.accounting.embedded, exact.accounting.reused) == (0, N_PHOTOS)
    assert exact.record.encoder == "64-d vectors of test_vit with random weights"


@pytest.mark.slow
def test_another_fast_build_embeds_no_exact_vector_again(fast: Build, built: Built) -> None:
    (usage,) = exact_usage()

    other = build(built.photos, name="other", distributed=False, precision="bf16")

    assert (other.accounting.embedded, events_of(other)[0]["n"]) == (N_PHOTOS, N_PHOTOS)
    assert other.record.fidelity != fast.record.fidelity
    # The only model that was loaded is its own, and no byte was written.
    assert [key[0] for key in local._warm] == [dataclasses.replace(TINY, precision="bf16")]
    assert exact_usage() == [usage]


@pytest.mark.slow
def test_a_fast_build_after_an_exact_one_embeds_no_exact_vector(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_mosaics(photos, 3)
    build(photos, name="exact", distributed=False)
    (usage,) = exact_usage()

    fast = build(photos, name="fast", distributed=False, **FAST_OPTIONS)

    assert (fast.accounting.embedded, events_of(fast)[0]["n"]) == (3, 3)
    assert [key[0] for key in local._warm] == [FAST]
    assert (usage["n_vectors"], exact_usage()) == (3, [usage])


@pytest.mark.slow
def test_an_exact_index_takes_a_fast_ones_name_only_when_it_is_to(
    fast: Build, built: Built
) -> None:
    build(built.photos, name="mine", distributed=False, **FAST_OPTIONS)

    for options in ({}, {"precision": "bf16"}, {"decode": "reduced"}):
        with pytest.raises(IndexConflictError, match="not exact: bf16 and reduced decoding"):
            build(built.photos, name="mine", distributed=False, **options)
    replaced = build(built.photos, name="mine", distributed=False, replace=True)

    assert replaced.state == "done"
    with replaced.index as index:
        assert index.encoder.is_exact
    # The other index of these photos is what it was.
    with fast.index as index:
        assert not index.encoder.is_exact


@pytest.mark.slow
def test_a_query_is_embedded_as_the_index_was(fast: Build, built: Built, tmp_path: Path) -> None:
    # The same picture in another file: what is indexed is not embedded again.
    photo = built.photos / "photo_0007.jpg"
    query = tmp_path / "twin.jpg"
    query.write_bytes(photo.read_bytes() + b"\0")

    with fast.index as index:
        (nearest,) = index.search(query, k=1)

    assert nearest.path == str(photo)
    # In fp32 it would be some 3e-5 away, and decoded in full some 3e-3.
    assert nearest.score > 1 - 1e-6
