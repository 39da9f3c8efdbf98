"""The command line as a user types it."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import toolkit as tk
from tests.pictures import jpeg, write_photos
from tests.support import CHEAP_FLAGS, INDEX, build_cli, run_cli, table
from toolkit.cli import main
from toolkit.errors import QueryError

#: Keys that scripts rely on.
BUILD_KEYS = {
    "run_id",
    "index",
    "state",
    "found",
    "indexed",
    "duplicates",
    "failed",
    "excluded",
    "pending",
    "embedded",
    "reused",
    "batches",
    "fallback_reason",
    "moves",
    "recall_at_10",
    "seconds",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "datasets" / "photos"
    write_photos(folder / "a", 5, seed=0)
    write_photos(folder / "b", 5, seed=100)
    return folder


def test_every_command_has_help_that_says_what_it_does() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        assert command.help.strip().endswith("."), name


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "import toolkit, toolkit.cli\n"
        "heavy = {'torch', 'timm', 'numpy', 'pandas', 'PIL', 'usearch'} & set(sys.modules)\n"
        "print(heavy or 'light')\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.strip() == "light", done.stdout


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["build"], "Missing argument"),
        (["build", "nowhere"], "TOOLKIT_DATASETS_DIR"),
        (["search", "nothing", "x.jpg"], "toolkit build"),
        (["attach"], "toolkit runs"),
        (["runs", "../../etc"], "toolkit runs"),
        (["logs", "20200101-000000-abcdef"], "toolkit runs"),
        (["build", ".", "--local", "--require-workers"], "exclude each other"),
        (["build", ".", "--model", "../evil", "--random-weights"], "timm"),
    ],
)
def test_wrong_use_is_one_sentence_with_a_cure_and_exit_code_2(args: list[str], word: str) -> None:
    done = run_cli(*args)

    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_setting_names_the_allowed_values() -> None:
    done = run_cli("indexes", env={"TOOLKIT_THREADS": "many"})

    assert done.returncode == 2
    assert "TOOLKIT_THREADS='many'" in done.stderr
    assert "a whole number from 1" in done.stderr


def test_lists_of_an_empty_world_say_what_to_do() -> None:
    assert "toolkit build" in run_cli("indexes").stdout
    assert "toolkit build" in run_cli("runs").stdout
    assert json.loads(run_cli("indexes", "--json").stdout) == []


@pytest.mark.slow
def test_build_search_and_lists_answer_with_the_promised_keys(photos: Path) -> None:
    built = build_cli("photos")
    query = next(photos.rglob("*.jpg"))

    found = json.loads(run_cli("search", INDEX, query, "-k", "3", "--json").stdout)
    runs = json.loads(run_cli("runs", "--json").stdout)
    indexes = json.loads(run_cli("indexes", "--json").stdout)
    datasets = json.loads(run_cli("datasets", "--json").stdout)

    assert built["exit"] == 0
    assert built.keys() >= BUILD_KEYS
    assert [list(hit) for hit in found] == [["rank", "score", "path", "dataset", "paths"]] * 3
    assert [hit["rank"] for hit in found] == [1, 2, 3]
    assert str(query) not in [hit["path"] for hit in found]
    assert [run["run_id"] for run in runs] == [built["run_id"]]
    assert [(i["name"], i["images"]) for i in indexes] == [(INDEX, 10)]
    assert [(d["name"], d["images"], d["indexes"]) for d in datasets] == [("photos", 10, [INDEX])]


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_no_vector(photos: Path, tmp_path: Path) -> None:
    done = run_cli("build", "photos", *CHEAP_FLAGS, "--dry-run", "--json")

    plan = json.loads(done.stdout)
    assert (plan["to_embed"], plan["changes"]["new"]) == (10, 10)
    assert not (tmp_path / "data" / "vectors").exists()
    assert run_cli("runs").stdout.startswith("no run")


@pytest.mark.slow
def test_export_and_import_give_the_same_index_and_nothing_is_paid_again(
    photos: Path, tmp_path: Path
) -> None:
    # Larger than what a scan reads of it, with a copy, and a name that is not text.
    (photos / "big.jpg").write_bytes(jpeg(size=(900, 700), seed=5))
    shutil.copy(photos / "big.jpg", os.path.join(os.fsencode(photos), b"copy\xff.jpg"))
    build_cli("photos")
    with tk.open_index(INDEX) as index:
        before = table(index)

    exported = run_cli("export", INDEX, tmp_path / "out")
    tk.configure(data_dir=tmp_path / "elsewhere")
    elsewhere = {"TOOLKIT_DATA_DIR": str(tmp_path / "elsewhere")}
    imported = run_cli("import", tmp_path / "out", "--name", INDEX, env=elsewhere)
    with tk.open_index(INDEX) as index:
        after = table(index)
    rebuilt = build_cli("photos", "--name", "again", env=elsewhere)

    assert (exported.returncode, imported.returncode) == (0, 0), imported.stderr
    assert np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy").shape == (11, 64)
    assert after == before
    assert (rebuilt["embedded"], rebuilt["duplicates"]) == (0, 1)


@pytest.mark.slow
def test_foreign_vectors_answer_vectors_and_say_that_they_know_no_encoder(tmp_path: Path) -> None:
    (tmp_path / "in" / "img_emb").mkdir(parents=True)
    (tmp_path / "in" / "metadata").mkdir()
    vectors = np.eye(3, 8, dtype=np.float16) * 5
    np.save(tmp_path / "in" / "img_emb" / "img_emb_0.npy", vectors)
    names = pd.DataFrame({"image_path": ["/a.jpg", "/b.jpg", "/c.jpg"]})
    names.to_parquet(tmp_path / "in" / "metadata" / "metadata_0.parquet")
    write_photos(tmp_path / "query", 1)

    imported = run_cli("import", tmp_path / "in", "--name", "foreign")
    again = run_cli("import", tmp_path / "in", "--name", "foreign")
    with tk.open_index("foreign") as index:
        (nearest,) = index.search(np.eye(8, dtype=np.float32)[1], k=1)
        with pytest.raises(QueryError, match="without its encoder"):
            index.search(tmp_path / "query" / "photo_0000.jpg")

    assert imported.returncode == 0, imported.stderr
    assert again.returncode == 2
    assert (nearest.path, round(nearest.score, 6)) == ("/b.jpg", 1.0)


@pytest.mark.slow
def test_gc_removes_what_no_index_uses_and_nothing_else(photos: Path) -> None:
    build_cli("photos")
    kept = json.loads(run_cli("store", "gc", "--json").stdout)
    for file in sorted((photos / "a").iterdir()):
        file.unlink()
    build_cli("photos", "--accept-changes")
    build_cli("photos", "--accept-changes")
    (photos / "new.jpg").write_bytes(jpeg(seed=77))
    build_cli("photos", "--accept-changes")

    removed = json.loads(run_cli("store", "gc", "--json").stdout)
    usage = json.loads(run_cli("store", "du", "--json").stdout)

    assert kept["n_vectors"] == 0
    assert removed["n_vectors"] == 5
    assert [row["n_vectors"] for row in usage] == [6]
    assert build_cli("photos")["embedded"] == 0


@pytest.mark.slow
def test_terminal_shows_model_device_road_and_where_it_writes(photos: Path) -> None:
    write_photos(photos / "many", 3000, seed=1000)
    parent, child = pty.openpty()
    # A terminal without a width shows no bar.
    termios.tcsetwinsize(child, (30, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit.cli", "build", "photos", *CHEAP_FLAGS],
        stdin=child,
        stdout=child,
        stderr=child,
    )
    os.close(child)

    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # the other end is closed: the command has ended
            break

    assert process.wait(timeout=60) == 0
    for word in (b"64-d vectors of test_vit", b"device cpu", b"road local", b"writes to"):
        assert word in shown
    # The bar moves: it is not closed by the line above it.
    assert re.search(rb"embed: +[1-9]\d*%", shown)
    assert b"found 3,010 = indexed 3,010" in shown


@pytest.mark.slow
def test_a_fast_build_shows_how_far_it_moved_the_vectors(tmp_path: Path) -> None:
    # Large enough to be decoded at a half.
    write_photos(tmp_path / "large", 12, size=(400, 340))
    flags = ("--local", "--precision", "bf16", "--decode", "reduced")
    words = "against exact vectors, 12 images: cosine "

    built = run_cli("build", tmp_path / "large", *CHEAP_FLAGS, *flags)
    again = run_cli("build", tmp_path / "large", *CHEAP_FLAGS, *flags)
    (second, first) = json.loads(run_cli("runs", "--json").stdout)
    shown = run_cli("runs", first["run_id"])
    exact = run_cli("build", tmp_path / "large", *CHEAP_FLAGS, "--local")

    assert (built.returncode, again.returncode) == (0, 0), built.stderr
    assert words in built.stdout
    assert words in shown.stdout
    assert first["fidelity"] in built.stdout
    # It embedded nothing.
    assert "exact" not in again.stdout
    assert second["fidelity"] is None
    assert exact.returncode == 2
    assert "not exact: bf16 and reduced decoding" in exact.stderr
    assert "--replace" in exact.stderr


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [("--precision", "fp16", "'fp32', 'bf16'"), ("--decode", "draft", "'full', 'reduced'")],
)
def test_fast_modes_that_do_not_exist_are_refused_with_those_that_do(
    flag: str, value: str, allowed: str
) -> None:
    done = run_cli("build", ".", flag, value)

    assert done.returncode == 2
    assert f"'{value}' is not one of {allowed}" in done.stderr


@pytest.mark.slow
def test_left_out_files_are_named_by_their_rule_after_a_build(photos: Path) -> None:
    (photos / "one.nef").write_bytes(b"raw")

    done = run_cli("build", "photos", *CHEAP_FLAGS)

    assert "left out: 1 RAW" in done.stdout


@pytest.mark.slow
def test_contact_sheet_is_written_though_a_hit_is_gone(photos: Path, tmp_path: Path) -> None:
    odd = os.path.join(os.fsencode(photos), b"latin\xe9.jpg")
    with open(odd, "wb") as file:
        file.write(jpeg(seed=31337))
    build_cli("photos")
    files = sorted(photos.rglob("photo*.jpg"))
    files[0].unlink()

    done = run_cli("search", INDEX, files[1], "-k", "20", "--sheet", tmp_path / "sheet.any")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sheet.any").read_bytes().startswith(b"\x89PNG")
    assert "latin\\xe9.jpg" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--where", "holiday"], "'holiday/*'"),
        (["-k", "0"], "x>=1"),
    ],
)
def test_search_that_can_find_nothing_says_why(photos: Path, args: list[str], word: str) -> None:
    build_cli("photos")

    done = run_cli("search", INDEX, next(photos.rglob("*.jpg")), *args)

    assert done.returncode == 2
    assert word in done.stderr


@pytest.mark.slow
def test_query_that_is_no_picture_is_named_without_advice_for_datasets(
    photos: Path, tmp_path: Path
) -> None:
    build_cli("photos")
    (tmp_path / "notes.txt").write_text("a text")

    text = run_cli("search", INDEX, tmp_path / "notes.txt")
    folder = run_cli("search", INDEX, photos)

    assert "not a picture" in text.stderr
    assert "exclude" not in text.stderr
    assert "is a folder" in folder.stderr


def test_data_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write_photos(tmp_path / "few", 1)

    done = run_cli("--data-dir", tmp_path / "file", "build", tmp_path / "few", *CHEAP_FLAGS)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "file") in done.stderr
