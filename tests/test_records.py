"""The values that travel: what goes in comes out, on every road."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from toolkit.records import (
    Batch,
    Embedded,
    Failed,
    FailureKind,
    FileStat,
    Item,
    Outcome,
    show_path,
)

KEY = bytes(range(16))
#: A name in another script, one that is not UTF-8, one with a line break.
PATHS = ["/фото/猫.jpg".encode(), b"/a/\xff\xfe.jpg", b"/a/two\nlines.jpg"]


def an_outcome() -> Outcome:
    stat = FileStat(10, 2**62, 1, -5)
    return Outcome(
        batch_id=7,
        fingerprint="f",
        embedded=(Embedded(1, KEY, 0, 640, 480, "JPEG", stat), Embedded(2, KEY, 1, 1, 1, "PNG")),
        failed=(Failed(3, FailureKind.DECODE, "é", KEY, stat), Failed(4, FailureKind.CRASH, "x")),
        vectors=np.array([[1, 0], [0.1, 0.2]], np.float32),
        seconds=0.25,
    )


def test_batch_survives_the_trip() -> None:
    items = tuple(Item(2**53 + n, path, n, KEY if n else None) for n, path in enumerate(PATHS))
    batch = Batch(7, "fingerprint", items)

    back = Batch.from_json(json.loads(json.dumps(batch.to_json())))

    assert back == batch


def test_outcome_survives_the_trip() -> None:
    outcome = an_outcome()

    back = Outcome.from_json(json.loads(json.dumps(outcome.to_json())), outcome.blob())

    assert (back.embedded, back.failed) == (outcome.embedded, outcome.failed)
    assert (back.batch_id, back.fingerprint, back.seconds) == (7, "f", 0.25)
    assert back.vectors.dtype == np.float32
    assert back.vectors.tobytes() == outcome.vectors.tobytes()


def test_outcome_without_a_vector_survives_the_trip() -> None:
    outcome = Outcome(1, "f", (), (Failed(3, FailureKind.CHANGED, "x"),), np.empty((0, 4), "f4"))

    back = Outcome.from_json(outcome.to_json(), outcome.blob())

    assert back.vectors.shape == (0, 4)


def test_vectors_of_another_order_in_memory_travel_row_after_row() -> None:
    columns = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))

    blob = Outcome(1, "f", (), (), columns).blob()

    assert np.frombuffer(blob, "<f4").tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", [b"", b"\0"])
def test_vectors_of_the_wrong_length_are_refused_with_both_figures(change: bytes) -> None:
    outcome = an_outcome()
    blob = outcome.blob() + change if change else outcome.blob()[:-1]

    with pytest.raises(ValueError, match=f"{len(blob)} bytes of vectors, 2 x 2 x 4"):
        Outcome.from_json(outcome.to_json(), blob)


def test_only_what_the_bytes_decide_is_permanent() -> None:
    permanent = [kind for kind in FailureKind if kind.is_permanent]

    assert permanent == [FailureKind.DECODE, FailureKind.CRASH]


@pytest.mark.parametrize(
    ("given", "kept"), [(5, 5), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)]
)
def test_inode_fits_a_signed_column(tmp_path: Path, given: int, kept: int) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    real = os.stat(file)
    fields = {n: getattr(real, n) for n in dir(real) if n.startswith("st_")}
    info = os.stat_result((real.st_mode, given, *tuple(real)[2:]), fields)

    found = FileStat.of(info)

    assert (found.size, found.inode) == (3, kept)
    assert (found.mtime_ns, found.ctime_ns) == (real.st_mtime_ns, real.st_ctime_ns)


def test_path_is_shown_as_text_and_escaped_only_where_it_is_none() -> None:
    assert [show_path(path) for path in PATHS] == [
        "/фото/猫.jpg",
        r"/a/\xff\xfe.jpg",
        "/a/two\nlines.jpg",
    ]
