"""The rules of dispatch that need no process: deadlines, sizes, who is believed, what travels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from toolkit.cluster.registry import WorkerInfo, WorkerState, WorkerView, WorkInfo
from toolkit.dispatch import transport
from toolkit.dispatch.check import check_outcome
from toolkit.dispatch.dispatcher import BATCH_ITEMS, LEAST_ITEMS, batch_items, parts
from toolkit.dispatch.job import Job
from toolkit.dispatch.leases import LIMIT_GRACE_S, Due, Lease, due
from toolkit.dispatch.passport import Passport
from toolkit.dispatch.transport import BYTES_BATCH, MAX_BYTES_IN_FLIGHT, PATHS_BATCH, Transport
from toolkit.embedding.spec import EncoderSpec, SpecCache
from toolkit.errors import AnswerError
from toolkit.images.golden import format_digests
from toolkit.records import Batch, Embedded, Failed, FailureKind, FileStat, Item, Outcome

RUN = "20260101-000000-abcdef"
SPEC = EncoderSpec.imported(4, "a test")
KEYS = [bytes([n]) * 16 for n in range(4)]
ITEMS = tuple(Item(n, b"/photos/%d.jpg" % n, 100) for n in range(3))


def an_outcome(**changes: object) -> Outcome:
    """Items 0 and 1 embedded, item 2 failed."""
    embedded = tuple(Embedded(n, KEYS[n], n, 8, 6, "JPEG") for n in range(2))
    failed = (Failed(2, FailureKind.DECODE, "no picture", KEYS[2]),)
    vectors = np.eye(2, 4, dtype=np.float32)
    outcome = Outcome(7, SPEC.fingerprint, embedded, failed, vectors)
    return dataclasses.replace(outcome, **changes)  # type: ignore[arg-type]


def a_lease(**changes: object) -> Lease:
    lease = Lease(Batch(7, SPEC.fingerprint, ITEMS), attempt=1, sent=ITEMS, sent_at=100.0)
    return dataclasses.replace(lease, **changes)  # type: ignore[arg-type]


def a_worker(state: WorkerState = WorkerState.BUSY, run: str = RUN, batch: int = 7) -> WorkerView:
    info = WorkerInfo(id="box-1", queues=("v1.x",), encoders={SPEC.fingerprint: "m"})
    work = WorkInfo(
        state=state, run=run, batch=batch, golden=(SPEC.fingerprint,), formats=format_digests()
    )
    return WorkerView("box-1", info, work, True, True, 0.1)


def verdict(lease: Lease, now: float, *views: WorkerView) -> Due:
    workers = {view.id: view for view in views}
    return due(lease, RUN, workers, now, claim_grace_s=3, beat_ttl_s=6, limit_s=300)[0]


def test_batch_that_nobody_claimed_is_looked_for_once_somebody_should_have() -> None:
    assert verdict(a_lease(), 102.9) is Due.NOTHING
    assert verdict(a_lease(), 103.1) is Due.LOOK
    assert verdict(a_lease(sent_at=None), 999.0) is Due.NOTHING


def test_batch_goes_out_again_when_its_claimer_fell_silent() -> None:
    claimed = a_lease(claimed_by="box-1", claimed_at=100.0)

    assert verdict(claimed, 101.0, a_worker()) is Due.NOTHING
    assert verdict(claimed, 101.0, a_worker(WorkerState.STALE)) is Due.SEND_AGAIN
    # One that came a moment ago is not in the list of the last look yet.
    assert verdict(claimed, 101.0) is Due.NOTHING
    assert verdict(claimed, 103.5) is Due.SEND_AGAIN


@pytest.mark.parametrize(
    "elsewhere",
    [
        a_worker(WorkerState.READY, run="", batch=0),
        a_worker(batch=8),
        a_worker(run="another run"),
    ],
)
def test_batch_whose_claimer_is_at_something_else_has_lost_its_answer(
    elsewhere: WorkerView,
) -> None:
    claimed = a_lease(claimed_by="box-1", claimed_at=100.0)

    # What a worker says of itself is up to one time to live old.
    assert verdict(claimed, 105.9, elsewhere) is Due.NOTHING
    assert verdict(claimed, 106.1, elsewhere) is Due.SEND_AGAIN


def test_batch_is_not_left_to_a_worker_beyond_its_limit() -> None:
    claimed = a_lease(claimed_by="box-1", claimed_at=100.0)

    assert verdict(claimed, 400.0 + LIMIT_GRACE_S - 1, a_worker()) is Due.NOTHING
    assert verdict(claimed, 400.0 + LIMIT_GRACE_S + 1, a_worker()) is Due.SEND_AGAIN


def test_batches_get_smaller_near_the_end_where_several_processes_share_them() -> None:
    assert batch_items(10_000, 2) == BATCH_ITEMS
    assert batch_items(100, 2) == 25
    assert batch_items(3, 2) == LEAST_ITEMS
    # A single process gains nothing from it.
    assert batch_items(3, 1) == BATCH_ITEMS


def test_parts_hold_every_item_in_order_and_one_at_least() -> None:
    items = tuple(Item(n, b"", size) for n, size in enumerate([5, 5, 99, 1, 4, 6]))

    found = parts(items, 10)

    assert [[item.id for item in part] for part in found] == [[0, 1], [2], [3, 4], [5]]


def test_good_outcome_is_believed() -> None:
    good = [(an_outcome(), ITEMS), (Outcome.empty(7, SPEC.fingerprint), ())]

    believed = [outcome for outcome, items in good if check_outcome(outcome, items, SPEC) is None]

    assert believed == [outcome for outcome, _ in good]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "f" * 64}, "another encoder"),
        ({"failed": ()}, "2 items were answered, not the 3"),
        ({"failed": (Failed(1, FailureKind.DECODE, "twice"),)}, "3 items were answered"),
        ({"vectors": np.eye(2, 5, dtype=np.float32)}, r"shape \(2, 5\)"),
        ({"vectors": np.eye(1, 4, dtype=np.float32)}, r"shape \(1, 4\)"),
        ({"vectors": 2 * np.eye(2, 4, dtype=np.float32)}, "not of length 1"),
        ({"vectors": np.full((2, 4), np.nan, np.float32)}, "not finite"),
        (
            {"embedded": tuple(Embedded(n, KEYS[n], 0, 8, 6, "JPEG") for n in range(2))},
            "named twice",
        ),
        (
            {"embedded": tuple(Embedded(n, b"short", n, 8, 6, "JPEG") for n in range(2))},
            "another content",
        ),
    ],
)
def test_outcome_that_is_wrong_is_not_believed(changes: dict[str, object], words: str) -> None:
    with pytest.raises(AnswerError, match=words):
        check_outcome(an_outcome(**changes), ITEMS, SPEC)


def test_vector_of_another_content_than_was_asked_for_is_not_believed() -> None:
    asked = (dataclasses.replace(ITEMS[0], key=KEYS[3]), *ITEMS[1:])

    with pytest.raises(AnswerError, match="another content"):
        check_outcome(an_outcome(), asked, SPEC)


def test_job_survives_the_trip_and_what_is_none_is_refused() -> None:
    job = Job(RUN, 2, Batch(7, SPEC.fingerprint, ITEMS), (1,), 1000)

    assert Job.from_json(job.to_json()) == job
    assert job.task_id == f"{RUN}/7/2"
    for rubbish in ({}, {**job.to_json(), "batch": 3}, {**job.to_json(), "blobs": None}):
        with pytest.raises(ValueError, match="not a batch"):
            Job.from_json(rubbish)


def test_picture_that_a_worker_cannot_see_goes_out_as_bytes_and_soon_all_do(
    tmp_path: Path,
) -> None:
    items = tuple(Item(n, bytes(tmp_path / f"{n}.jpg"), 3) for n in range(3))
    for item in items:
        Path(item.path.decode()).write_bytes(b"abc")
    way, lease = Transport(), a_lease(batch=Batch(7, SPEC.fingerprint, items))
    by_path = way.load(lease)
    unreadable = Failed(2, FailureKind.UNREADABLE, "no such file")

    one = way.finished(lease, an_outcome(failed=(unreadable,)), set(), None)
    after_one = way.load(lease)
    all_three = way.finished(a_lease(sent=items), Outcome.empty(7, ""), {0, 1, 2}, None)

    assert (by_path, list(after_one)) == ({}, [2])
    assert [item.id for item in one.again] == [2]
    assert one.outcome.failed == ()
    assert [item.id for item in all_three.again] == [0, 1, 2]
    assert list(way.load(lease)) == [0, 1, 2]
    assert way.batch_bytes == BYTES_BATCH < PATHS_BATCH


def test_failure_of_a_picture_that_came_as_bytes_is_the_pictures_own() -> None:
    failed = (Failed(2, FailureKind.CHANGED, "is another one", KEYS[2]),)
    lease = a_lease(blobs=(2,))

    finished = Transport().finished(lease, an_outcome(failed=failed), set(), None)

    assert (finished.again, finished.outcome.failed) == ((), failed)


def test_format_that_a_worker_lacks_is_tried_here() -> None:
    poor = dataclasses.replace(a_worker().work or WorkInfo(), formats={"JPEG": "x"})

    finished = Transport().finished(a_lease(), an_outcome(), set(), poor)

    assert [item.id for item in finished.elsewhere] == [2]
    assert finished.outcome.failed == ()


def test_clocks_and_inodes_of_another_machine_are_not_remembered() -> None:
    stat = FileStat(100, 1, 2, 3)
    embedded = tuple(dataclasses.replace(e, stat=stat) for e in an_outcome().embedded)

    finished = Transport().finished(a_lease(), an_outcome(embedded=embedded), set(), None)

    assert [e.stat for e in finished.outcome.embedded] == [None, None]


def test_file_too_large_to_be_sent_is_embedded_here(tmp_path: Path) -> None:
    large = Item(0, bytes(tmp_path / "large.tif"), MAX_BYTES_IN_FLIGHT + 1)
    gone = Item(1, bytes(tmp_path / "gone.jpg"), 3)
    way = Transport()
    way.finished(a_lease(), Outcome.empty(7, ""), {0, 1, 2}, None)
    lease = a_lease(batch=Batch(8, SPEC.fingerprint, (large, gone)))

    blobs = way.load(lease)

    assert (blobs, lease.sent, lease.elsewhere) == ({}, (), (large,))
    assert [failure.kind for failure in lease.failed] == [FailureKind.UNREADABLE]
    assert way.n_bytes((large, gone)) == 3
    assert transport.BLIND_SHARE < 1


@pytest.fixture
def specs(tmp_path: Path) -> SpecCache:
    cache = SpecCache(tmp_path / "specs")
    cache.settle(SPEC, np.eye(3, 4, dtype=np.float32), "cpu")
    return cache


def test_worker_that_answered_wrongly_is_believed_no_more(specs: SpecCache) -> None:
    passport = Passport(SPEC, specs)

    before = passport.is_believed("box-1")
    passport.caught("box-1", "rows are missing")

    assert not before  # nobody looked at it yet
    assert not passport.is_believed("box-1")
