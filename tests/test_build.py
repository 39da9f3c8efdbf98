"""Whole builds with a real model process: what is new, what is gone, what is paid."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import toolkit as tk
from tests.pictures import (
    cmyk_jpeg,
    gif_animated,
    jpeg,
    png,
    turned,
    write_bad_files,
    write_photos,
)
from tests.support import (
    CHEAP,
    CHEAP_FLAGS,
    INDEX,
    build,
    build_cli,
    run_cli,
    save_random_weights,
    table,
    wait_until,
)
from toolkit.dispatch.local import close_warm
from toolkit.errors import (
    BuildFailedError,
    BuildInProgressError,
    DatasetError,
    IndexConflictError,
    QueryError,
    RunCancelledError,
    SettingError,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "datasets" / "photos"
    write_photos(folder / "a", 6, seed=0)
    write_photos(folder / "b", 6, seed=100)
    return folder


def test_first_build_indexes_every_photo_in_order_of_its_path(photos: Path) -> None:
    run = build("photos")

    with tk.open_index(INDEX) as index:
        paths = index.to_pandas()["path"].tolist()
        norms = np.linalg.norm(index.vectors.astype(np.float64), axis=1)
    assert run.state == "done"
    assert run.accounting.embedded == 12
    assert paths == sorted(str(p) for p in photos.rglob("*.jpg"))
    assert np.abs(norms - 1).max() < 1e-6


def test_second_build_embeds_nothing_and_no_process_imports_torch(
    photos: Path, tmp_path: Path
) -> None:
    write_bad_files(photos / "bad")
    first = build_cli("photos")
    (tmp_path / "data" / "logs" / "embedder.log").unlink()

    # The variable reaches every child; each prints what it imports to its stderr.
    second = build_cli("photos", env={"PYTHONPROFILEIMPORTTIME": "1"})

    log = tmp_path / "data" / "logs" / "embedder.log"
    imports = second["stderr"] + (log.read_text() if log.exists() else "")
    assert first["exit"] == second["exit"] == 0
    assert first["embedded"] >= 12
    assert second["embedded"] == 0
    assert second["failed"] == first["failed"] > 0
    assert "toolkit.pipeline" in imports
    assert " torch" not in imports


def test_renamed_folder_is_not_embedded_again(photos: Path) -> None:
    build("photos")
    photos.rename(photos.with_name("pictures"))

    run = build("pictures")

    assert (run.accounting.embedded, run.accounting.indexed) == (0, 12)


def test_copied_file_is_a_duplicate_and_not_embedded_again(photos: Path) -> None:
    build("photos")
    original = next(photos.rglob("*.jpg"))
    shutil.copy(original, photos / "zz copy.jpg")

    run = build("photos")

    with tk.open_index(INDEX) as index:
        (copies,) = index.duplicates()["paths"]
    assert (run.accounting.embedded, run.accounting.duplicates) == (0, 1)
    assert set(copies) == {str(original), str(photos / "zz copy.jpg")}


def test_two_identical_new_files_are_embedded_once(photos: Path) -> None:
    shutil.copy(next(photos.rglob("*.jpg")), photos / "copy.jpg")

    run = build("photos")

    assert (run.accounting.embedded, run.accounting.duplicates) == (12, 1)


def test_second_index_over_the_same_photos_embeds_nothing(photos: Path) -> None:
    build("photos")

    run = build("photos", name="other")

    assert (run.accounting.embedded, run.accounting.reused) == (0, 12)


def test_removed_added_and_edited_files_are_each_reflected(photos: Path) -> None:
    build("photos", limit=None)
    files = sorted(photos.rglob("*.jpg"))
    removed, edited = files[0], files[5]
    removed.unlink()
    (photos / "new.jpg").write_bytes(jpeg(seed=7777))
    data = bytearray(edited.read_bytes())
    # The same size and still a picture: one more byte of padding after the end, one less before
    # would not do, so the colour of one pixel block changes through the quantisation table.
    data[data.index(b"\xff\xdb") + 5] ^= 1
    edited.write_bytes(data)

    plan = tk.plan("photos", **CHEAP)
    run = build("photos")

    with tk.open_index(INDEX) as index:
        paths = set(index.to_pandas()["path"])
    assert (plan.changes.new, plan.changes.changed, plan.changes.deleted) == (1, 1, 1)
    assert run.accounting.embedded == 2
    assert str(removed) not in paths
    assert str(photos / "new.jpg") in paths


def test_index_grown_step_by_step_equals_one_built_at_once(photos: Path, tmp_path: Path) -> None:
    build("photos", limit=5, name="grown")
    build("photos", limit=9, name="grown")
    build("photos", name="grown")
    tk.configure(data_dir=tmp_path / "elsewhere")
    build("photos", name="whole")

    with tk.open_index("whole") as whole:
        expected = table(whole)
    tk.configure(data_dir=None)
    with tk.open_index("grown") as grown:
        assert table(grown) == expected


def test_bad_files_are_listed_with_their_reasons_and_cost_nothing_else(photos: Path) -> None:
    expected = write_bad_files(photos / "bad")

    run = build("photos")

    reasons = {Path(f["path"]).name: f["reason"] for f in run.failures.to_dict("records")}
    books = run.accounting
    assert run.state == "done"
    assert books.found == books.indexed + books.duplicates + books.failed + books.excluded
    assert reasons.keys() == expected.keys()
    for name, word in expected.items():
        assert word in reasons[name], name


def test_every_identical_corrupt_file_counts_as_failed(photos: Path) -> None:
    for name in ("x.jpg", "y.jpg", "z.jpg"):
        (photos / name).write_bytes(b"no picture at all")

    first = build("photos")
    second = build("photos")

    assert first.accounting.failed == second.accounting.failed == 3
    assert len(second.failures) == 3


def test_retry_failed_tries_again_what_is_known_to_be_no_picture(photos: Path) -> None:
    (photos / "x.jpg").write_bytes(b"no picture at all")
    build("photos")

    run = build("photos", retry_failed=True)

    assert (run.record.batches["local"], run.accounting.failed) == (1, 1)


@pytest.mark.parametrize("kind", ["empty", "all bad"])
def test_nothing_to_index_is_an_error_and_publishes_nothing(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "datasets" / "photos"
    folder.mkdir(parents=True)
    if kind == "all bad":
        (folder / "x.jpg").write_bytes(b"no picture at all")

    with pytest.raises(BuildFailedError) as caught:
        build("photos")

    assert "photos" in str(caught.value)
    assert tk.indexes() == []


def test_missing_dataset_is_wrong_use_and_names_what_there_is(photos: Path) -> None:
    answer = build_cli("fotos")

    assert answer["exit"] == 2
    assert "photos" in answer["stderr"]


def test_emptied_dataset_is_held_until_it_is_accepted(photos: Path, tmp_path: Path) -> None:
    build("photos")
    with tk.open_index(INDEX) as index:
        before = table(index)
    shutil.rmtree(photos)
    photos.mkdir()

    held = build("photos")
    with tk.open_index(INDEX) as index:
        while_held = table(index)
    exit_code = build_cli("photos")["exit"]
    released = held.publish()

    with tk.open_index(INDEX) as index:
        after = table(index)
    assert held.state == "held"
    assert "12 of the 12" in str(held.record.error)
    assert exit_code == 1
    assert while_held == before
    assert (released.state, after) == ("done", [])


def test_losing_a_tenth_is_published_and_more_is_held(photos: Path) -> None:
    write_photos(photos / "c", 8, seed=200)
    build("photos")
    files = sorted(photos.rglob("*.jpg"))
    for file in files[:2]:
        file.unlink()

    tenth = build("photos")
    files[2].unlink()
    files[3].unlink()
    more = build("photos")

    assert (tenth.state, more.state) == ("done", "held")


def test_unreadable_files_keep_their_vectors(photos: Path) -> None:
    # Without these capabilities root is refused like anybody else.
    drop = "-dac_override,-dac_read_search"
    denied = ("setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}")
    write_photos(photos / "c", 40, seed=200)
    build("photos")
    with tk.open_index(INDEX) as index:
        before = table(index)
    one = next((photos / "c").iterdir())
    one.chmod(0)

    one_file = build_cli("photos", prefix=denied)
    (photos / "a").chmod(0)
    whole_folder = build_cli("photos", prefix=denied)
    accepted = build_cli("photos", "--accept-changes", prefix=denied)
    next_one = build_cli("photos", prefix=denied)

    with tk.open_index(INDEX) as index:
        after = table(index)
    assert (one_file["state"], one_file["kept"]) == ("done", 1)
    assert (whole_folder["exit"], whole_folder["state"]) == (1, "held")
    assert (accepted["state"], accepted["kept"], accepted["embedded"]) == ("done", 7, 0)
    assert after == before
    # What was accepted is no news to the guard.
    assert (next_one["state"], next_one["kept"]) == ("done", 7)
    (photos / "a").chmod(0o755)


def test_vanished_file_is_not_kept(photos: Path) -> None:
    build("photos")
    next(photos.rglob("*.jpg")).unlink()

    run = build("photos")

    assert (run.accounting.indexed, run.accounting.kept) == (11, 0)


def test_other_sources_or_another_encoder_are_refused_unless_replaced(
    photos: Path, tmp_path: Path
) -> None:
    write_photos(tmp_path / "others", 3, seed=500)
    build("photos", name="mine")

    with pytest.raises(IndexConflictError, match="was built from"):
        build(tmp_path / "others", name="mine")
    with pytest.raises(IndexConflictError, match="64-d vectors of test_vit"):
        build("photos", name="mine", model="test_vit2")
    run = build(tmp_path / "others", name="mine", replace=True)

    assert (run.state, run.accounting.indexed) == ("done", 3)


def test_second_build_of_an_index_is_refused_with_the_run_that_has_it(photos: Path) -> None:
    write_photos(photos / "many", 400, seed=1000)
    first = build("photos", wait=False)

    with pytest.raises(BuildInProgressError, match=first.run_id):
        build("photos", wait=False)
    n_runs = len(tk.runs())
    with pytest.raises(BuildInProgressError, match=first.run_id):
        build("photos")

    # What is known before a process is started leaves no run behind.
    assert n_runs == 1
    assert first.wait(timeout_s=120).state == "done"


def test_detached_build_is_found_by_attach_and_can_be_cancelled(photos: Path) -> None:
    write_photos(photos / "many", 800, seed=1000)
    run = build("photos", wait=False)
    wait_until(lambda: run.progress.done > 0 and run.progress.stage == "embed", "progress")

    tk.attach().cancel()
    with pytest.raises(RunCancelledError):
        run.wait(timeout_s=60)

    again = build("photos")
    assert 0 < run.accounting.embedded < 812
    assert again.accounting.embedded == 812 - run.accounting.embedded


def test_interrupt_ends_with_130_and_the_next_build_goes_on(photos: Path) -> None:
    write_photos(photos / "many", 800, seed=1000)
    run = build("photos", wait=False)
    wait_until(lambda: run.accounting.embedded > 0, "an embedded image")

    os.kill(run.record.pid, 2)
    wait_until(lambda: not run.state.is_live, "the end of the run")

    again = build("photos")
    assert run.state == "interrupted"
    assert again.accounting.embedded == 812 - run.accounting.embedded


def test_full_disk_is_one_clear_error_and_the_next_build_goes_on(
    photos: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        tk.configure(data_dir=disk)
        build("photos")
        with tk.open_index(INDEX) as index:
            before = table(index)
        close_warm()
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - (200 << 10)))
        write_photos(photos / "many", 600, seed=1000)

        full = build_cli("photos", env={"TOOLKIT_DATA_DIR": str(disk)})
        with tk.open_index(INDEX) as index:
            untouched = table(index)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        after = build("photos")

        assert full["exit"] == 1
        assert "disk is full" in full["stderr"]
        assert untouched == before
        assert (after.state, after.accounting.indexed) == ("done", 612)
    finally:
        # The child's log lies on that disk, and so does what this process has mapped.
        close_warm()
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_threads_and_batch_size_do_not_show_in_the_result(photos: Path, tmp_path: Path) -> None:
    build("photos")
    with tk.open_index(INDEX) as index:
        expected = np.array(index.vectors)
    tk.configure(threads=1, data_dir=tmp_path / "elsewhere")
    build("photos", batch_size=5)

    with tk.open_index(INDEX) as index:
        assert np.abs(index.vectors - expected).max() <= 1e-5


def test_settings_changed_after_import_are_used_by_the_next_call(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "elsewhere" / "few", 2, seed=900)
    monkeypatch.setenv("TOOLKIT_DATASETS_DIR", str(tmp_path / "elsewhere"))

    by_environment = build("few", name="few")
    tk.configure(datasets_dir=photos.parent)
    with pytest.raises(DatasetError):
        build("few", name="few")

    assert by_environment.accounting.indexed == 2


def test_progress_is_told_while_a_build_runs(photos: Path) -> None:
    write_photos(photos / "many", 400, seed=1000)
    seen = set()
    run = build("photos", wait=False)

    def watch() -> None:
        while run.state.is_live:
            seen.add(run.progress.stage)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run.wait(timeout_s=120)
    watcher.join(timeout=10)

    assert "embed" in seen


def test_failures_are_written_as_csv(photos: Path, tmp_path: Path) -> None:
    (photos / "x.jpg").write_bytes(b"no picture at all")
    run = build("photos")

    done = run_cli("runs", run.run_id, "--csv", tmp_path / "failures.csv")

    lines = (tmp_path / "failures.csv").read_text().splitlines()
    assert done.returncode == 0
    assert lines[0] == "path,kind,reason,dataset"
    assert str(photos / "x.jpg") in lines[1]


def test_required_workers_are_never_replaced_by_local_work(photos: Path, tmp_path: Path) -> None:
    answer = build_cli("photos", "--require-workers", env={"TOOLKIT_REQUIRE_WAIT_S": "1"})

    assert answer["exit"] == 1
    assert "no worker could take the work in 1 s" in answer["stderr"]
    assert tk.indexes() == []


def test_bad_files_never_take_more_than_2_gb_of_memory(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "photos"
    write_bad_files(folder)
    (folder / "one_pixel.png").write_bytes(png(size=(1, 1)))
    (folder / "animated.gif").write_bytes(gif_animated())
    (folder / "cmyk.jpg").write_bytes(cmyk_jpeg())
    for orientation in range(1, 9):
        (folder / f"exif{orientation}.jpg").write_bytes(turned(orientation))
    (folder / "large.jpg").write_bytes(jpeg(size=(8000, 6000)))
    command = [sys.executable, "-m", "toolkit.cli", "build", "photos", *CHEAP_FLAGS, "--json"]

    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident_bytes(process.pid))
            time.sleep(0.01)
        assert process.stdout is not None
        answer = json.load(process.stdout)

    assert process.returncode == 0
    assert (answer["indexed"], answer["duplicates"]) == (12, 0)
    assert 50e6 < peak < 2e9


def _resident_bytes(pid: int) -> int:
    """Memory of a process and all that it started."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


@pytest.mark.parametrize("loss", ["dataset missing", "every file fails"])
def test_published_index_is_untouched_when_nothing_can_be_indexed(photos: Path, loss: str) -> None:
    build("photos")
    with tk.open_index(INDEX) as index:
        before = table(index)
    if loss == "dataset missing":
        shutil.rmtree(photos)
    else:
        for file in photos.rglob("*.jpg"):
            file.write_bytes(b"no picture at all, " + file.name.encode())

    answer = build_cli("photos")

    with tk.open_index(INDEX) as index:
        assert table(index) == before
    assert answer["exit"] in (1, 2)
    assert len(answer["stderr"].strip().splitlines()) == 1 or answer["state"] == "held"


def test_damaged_index_is_named_and_replace_builds_it_from_the_store(
    photos: Path, tmp_path: Path
) -> None:
    build("photos")
    (manifest,) = (tmp_path / "data" / "indexes").rglob("manifest.json")
    manifest.write_text("{")

    damaged = build_cli("photos")
    (listed,) = tk.indexes()
    run = build("photos", replace=True)

    with tk.open_index(INDEX) as index:
        assert len(index) == 12
    assert damaged["exit"] == 1
    assert "--replace" in damaged["stderr"]
    assert (listed["name"], "--replace" in listed["encoder"]) == (INDEX, True)
    assert run.accounting.embedded == 0


def test_estimate_after_an_interrupted_build_is_no_fantasy(photos: Path) -> None:
    write_photos(photos / "many", 800, seed=1000)
    run = build("photos", wait=False)
    wait_until(lambda: run.accounting.embedded >= 64, "a stored batch")
    os.kill(run.record.pid, 9)
    wait_until(lambda: not run.state.is_live, "the end of the run")

    plan = tk.plan("photos", **CHEAP)

    assert plan.seconds is not None
    assert 0.05 < plan.seconds < 600
    assert run.accounting.found == 812


def test_closed_index_says_so(photos: Path) -> None:
    build("photos")
    index = tk.open_index(INDEX)
    index.close()

    with pytest.raises(QueryError, match="closed; open it again"):
        index.search(next(photos.rglob("*.jpg")))


def test_embed_takes_one_picture_or_many_of_any_kind(photos: Path) -> None:
    build("photos")
    files = sorted(photos.rglob("*.jpg"))
    with Image.open(files[1]) as picture:
        pixels = np.asarray(picture)

    one = tk.embed(files[0], **CHEAP)
    many = tk.embed([files[0], pixels, Image.fromarray(pixels)], **CHEAP)

    with tk.open_index(INDEX) as index:
        stored = np.array(index.vectors[:2])
    assert one.shape == (1, 64)
    assert np.abs(one[0] - stored[0]).max() <= 1e-6
    assert np.abs(many - stored[[0, 1, 1]]).max() <= 1e-6


def test_file_that_changes_back_is_not_embedded_again(photos: Path) -> None:
    file = photos / "big.jpg"
    before, after = jpeg(size=(900, 700), seed=1), jpeg(size=(900, 700), seed=2)
    file.write_bytes(before)
    build("photos")
    file.write_bytes(after)
    build("photos")
    file.write_bytes(before)

    run = build("photos")

    # Larger than both ends together, so that only the whole file tells.
    assert min(len(before), len(after)) > 2 * (64 << 10)
    assert (run.state, run.accounting.embedded) == ("done", 0)


def test_file_that_two_datasets_hold_is_no_duplicate_of_itself(photos: Path) -> None:
    run = build([photos, photos / "a"], name="nested")

    with tk.open_index("nested") as index:
        assert len(index.duplicates()) == 0
    assert (run.accounting.indexed, run.accounting.duplicates) == (12, 0)
    assert run.record.excluded_by == {"named twice": 6}


def test_raised_limit_of_pixels_tries_again_what_was_too_large(photos: Path) -> None:
    (photos / "large.jpg").write_bytes(jpeg(size=(400, 300), seed=5))
    tk.configure(max_pixels=100_000)
    small = build("photos")
    tk.configure(max_pixels=1_000_000)

    large = build("photos")
    tk.configure(max_pixels=100_000)
    again = build("photos", name="other")

    assert (small.accounting.failed, large.accounting.failed) == (1, 0)
    assert (large.accounting.embedded, again.accounting.failed) == (1, 0)


def test_release_accepts_the_losses_that_were_shown_and_no_more(photos: Path) -> None:
    build("photos")
    files = sorted(photos.rglob("*.jpg"))
    for file in files[:3]:
        file.unlink()
    held = build("photos")
    shutil.rmtree(photos)
    photos.mkdir()

    more = held.publish()

    with tk.open_index(INDEX) as index:
        assert len(index) == 12
    assert (held.state, more.state) == ("held", "held")


def test_replaced_weights_are_not_answered_by_a_warm_child(photos: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_random_weights(weights, seed=1)
    build("photos", name="first", pretrained=True, checkpoint_path=weights)
    save_random_weights(weights, seed=2)

    build("photos", name="second", pretrained=True, checkpoint_path=weights)

    with tk.open_index("first") as first, tk.open_index("second") as second:
        assert first.encoder.fingerprint != second.encoder.fingerprint
        assert np.abs(first.vectors - second.vectors).max() > 0.01


def test_many_identical_bad_files_are_looked_at_once(photos: Path) -> None:
    for n in range(30):
        (photos / f"bad{n}.jpg").write_bytes(b"no picture, " * 20_000)

    run = build("photos")

    assert run.accounting.failed == 30
    assert run.record.batches["local"] <= 2


def test_gc_does_not_run_beside_a_build(photos: Path) -> None:
    write_photos(photos / "many", 800, seed=1000)
    run = build("photos", wait=False)
    wait_until(lambda: run.accounting.embedded > 0, "an embedded image")

    with pytest.raises(BuildInProgressError):
        tk.store_gc()

    assert run.wait(timeout_s=120).state == "done"
    assert tk.store_gc()["n_vectors"] == 0


def test_cancel_before_anything_is_embedded_publishes_nothing(photos: Path) -> None:
    build("photos", name="other")
    # So many names of one picture that the scan takes longer than we do to cancel.
    (photos / "many").mkdir()
    for n in range(4000):
        (photos / "many" / f"{n}.jpg").hardlink_to(photos / "a" / "photo_0000.jpg")
    queued = build("photos", wait=False)
    queued._view.request_cancel()

    with pytest.raises(RunCancelledError):
        queued.wait(timeout_s=60)

    assert [index["name"] for index in tk.indexes()] == ["other"]


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "ä+ö 猫"])
def test_any_name_of_an_index_stays_in_its_place(photos: Path, tmp_path: Path, name: str) -> None:
    build("photos", name=name)

    assert [index["name"] for index in tk.indexes()] == [name]
    assert not (tmp_path / "data" / "versions").exists()
    with pytest.raises(SettingError, match="200 bytes"):
        build("photos", name="x" * 300)


def test_search_asks_for_no_more_than_there_is(photos: Path) -> None:
    build("photos")

    with tk.open_index(INDEX) as index:
        hits = index.search(next(photos.rglob("*.jpg")), k=10**9)

    assert len(hits) == 11


def test_query_picture_is_turned_as_its_file_would_be(photos: Path) -> None:
    file = photos / "turned.jpg"
    file.write_bytes(turned(6))
    build("photos")

    with tk.open_index(INDEX) as index, Image.open(file) as picture:
        (nearest,) = index.search(picture, k=1, include_self=True)

    assert nearest.path == str(file)
    assert nearest.score > 0.9999


def test_one_pattern_may_be_given_alone(photos: Path) -> None:
    run = build("photos", include="*0.jpg", exclude="b")

    assert (run.accounting.indexed, run.accounting.excluded) == (1, 11)
