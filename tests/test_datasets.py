"""What a caller may name as a dataset, and what a name means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from toolkit.errors import DatasetError
from toolkit.images.datasets import Source, list_datasets, resolve_sources


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of the datasets, with ``cats`` in it."""
    (tmp_path / "datasets" / "cats").mkdir(parents=True)
    return tmp_path / "datasets"


def only(datasets: Any, home: Path) -> Source:
    (source,) = resolve_sources(datasets, home)
    return source


def entries(source: Source) -> list[tuple[str, str | None]]:
    return [(os.fsdecode(path), label) for path, label in source.entries]


def test_name_is_looked_up_before_a_path(home: Path, tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()

    named, path = only("cats", home), only("./cats", home)

    assert (named.name, named.root) == ("cats", os.fsencode(home / "cats"))
    assert (path.name, path.root) == ("cats", os.fsencode(tmp_path / "cats"))


def test_name_that_no_dataset_has_is_a_path(home: Path, tmp_path: Path) -> None:
    (tmp_path / "dogs").mkdir()

    assert only("dogs", home).root == os.fsencode(tmp_path / "dogs")


@pytest.mark.parametrize("given", ["folder", b"folder", Path("folder"), "folder/", "../w/folder"])
def test_root_is_absolute_however_the_folder_is_given(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any
) -> None:
    (tmp_path / "w" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "w")

    source = only(given, home)

    assert (source.name, source.root) == ("folder", os.fsencode(tmp_path / "w" / "folder"))


def test_root_is_absolute_where_the_folder_of_the_datasets_is_not(home: Path) -> None:
    assert only("cats", Path("datasets")).root == os.fsencode(home / "cats")


def test_order_given_is_kept(home: Path) -> None:
    (home / "ants").mkdir()

    assert [s.name for s in resolve_sources(["cats", "ants"], home)] == ["cats", "ants"]


def test_same_name_twice_is_told_apart_by_the_whole_path(home: Path, tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()

    names = [s.name for s in resolve_sources(["cats", "./cats"], home)]

    assert names == [str(home / "cats"), str(tmp_path / "cats")]


def test_folder_in_a_place_that_is_not_text_gets_a_name_that_is(home: Path) -> None:
    odd = os.fsencode(home) + b"/\xff"
    os.makedirs(odd + b"/cats")

    second = resolve_sources(["cats", odd + b"/cats"], home)[1]

    assert second.name == second.identity == rf"{home}/\xff/cats"
    assert second.root == odd + b"/cats"


@pytest.mark.parametrize("again", ["cats", "datasets/cats", "datasets/../datasets/cats/"])
def test_same_folder_given_twice_is_refused(home: Path, again: str) -> None:
    with pytest.raises(DatasetError, match="cats was given twice"):
        resolve_sources(["cats", again], home)


def test_missing_dataset_names_what_exists_and_the_setting(home: Path) -> None:
    (home / "ants").mkdir()
    (home / ".hidden").mkdir()
    (home / "file.txt").touch()

    with pytest.raises(DatasetError) as caught:
        resolve_sources("cast", home)

    message = str(caught.value)
    assert "'cast'" in message
    assert "(there: ants, cats)" in message
    assert "TOOLKIT_DATASETS_DIR" in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no dataset was named"),
        ("", "empty name"),
        (7, "not 7"),
        ([None], "not None"),
        ("no\0such", "no dataset"),
    ],
)
def test_what_is_no_dataset_is_refused(home: Path, given: Any, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        resolve_sources(given, home)


def test_text_list_is_relative_to_its_own_folder(home: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    lines = "a.jpg\r\nsub/b.jpg\n\n./c.jpg\n/d.jpg\n spaced .jpg"
    (tmp_path / "lists" / "mine.txt").write_bytes(lines.encode())

    source = only("lists/mine.txt", home)

    names = ["a.jpg", "sub/b.jpg", "c.jpg", "/d.jpg", " spaced .jpg"]
    assert entries(source) == [(str(tmp_path / "lists" / name), None) for name in names]
    assert (source.name, source.identity) == ("mine", f"list:{tmp_path / 'lists' / 'mine.txt'}")


def test_csv_list_gives_labels_where_it_has_them(home: Path, tmp_path: Path) -> None:
    text = 'label,path,more\ncat,a.jpg,1\n,b.jpg,2\n"two, words","c ""d"".jpg",3\n'
    (tmp_path / "mine.csv").write_text(text)

    found = entries(only("mine.csv", home))

    assert found == [
        (str(tmp_path / "a.jpg"), "cat"),
        (str(tmp_path / "b.jpg"), None),
        (str(tmp_path / 'c "d".jpg'), "two, words"),
    ]


def test_row_of_a_csv_without_a_path_is_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("label,path\ncat,a.jpg\nx,\n")

    with pytest.raises(DatasetError, match=r"mine\.csv, line 3: there is no path"):
        only("mine.csv", home)


def test_row_of_a_csv_that_ends_early_has_no_label(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("path,label\na.jpg\n")

    assert entries(only("mine.csv", home)) == [(str(tmp_path / "a.jpg"), None)]


@pytest.mark.parametrize(("name", "head"), [("mine.txt", b""), ("mine.csv", b"path\r\n")])
def test_mark_that_windows_puts_before_a_list_is_no_part_of_it(
    home: Path, tmp_path: Path, name: str, head: bytes
) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + head + "фото.jpg\r\n".encode())

    assert entries(only(name, home)) == [(str(tmp_path / "фото.jpg"), None)]


@pytest.mark.parametrize(
    ("name", "content"),
    [("mine.txt", b"\xff.jpg\n"), ("mine.csv", b"path,label\n\xff.jpg,l\xe9\n")],
)
def test_names_in_a_list_may_be_any_bytes(
    home: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)

    ((path, label),) = only(name, home).entries

    assert path == os.fsencode(tmp_path) + b"/\xff.jpg"
    assert label in (None, r"l\xe9")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["mine.txt", "mine.csv"])
def test_list_in_utf16_is_refused_with_the_cure(
    home: Path, tmp_path: Path, name: str, encoding: str
) -> None:
    (tmp_path / name).write_bytes("path\r\na.jpg\r\n".encode(encoding))

    with pytest.raises(DatasetError, match=r"UTF-8|no column 'path'"):
        resolve_sources(name, home)


@pytest.mark.parametrize("content", ["", "file\na.jpg\n", "a.jpg\nb.jpg\n"])
def test_csv_without_the_header_is_refused(home: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.csv").write_text(content)

    with pytest.raises(DatasetError, match=r"mine\.csv has no column 'path'"):
        resolve_sources("mine.csv", home)


def test_csv_with_a_field_beyond_all_measure_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("path\n" + "x" * 200_000)

    with pytest.raises(DatasetError, match="cannot read the list"):
        resolve_sources("mine.csv", home)


def test_table_may_have_labels(home: Path, tmp_path: Path) -> None:
    with_labels = pd.DataFrame({"path": ["a.jpg", Path("/b.jpg")], "label": ["cat", 7]})
    without = pd.DataFrame({"path": ["a.jpg", "/b.jpg"]})

    assert entries(only(with_labels, home)) == [(f"{tmp_path}/a.jpg", "cat"), ("/b.jpg", "7")]
    assert entries(only(without, home)) == [(f"{tmp_path}/a.jpg", None), ("/b.jpg", None)]


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT, ""])
def test_missing_label_of_a_table_is_none(home: Path, missing: Any) -> None:
    frame = pd.DataFrame({"path": ["/a", "/b"], "label": pd.Series(["x", missing], dtype=object)})

    assert entries(only(frame, home)) == [("/a", "x"), ("/b", None)]


@pytest.mark.parametrize("path", [None, float("nan"), 7])
def test_table_with_something_else_than_a_path_is_refused(home: Path, path: Any) -> None:
    frame = pd.DataFrame({"path": pd.Series(["/a", path], dtype=object)})

    with pytest.raises(DatasetError, match="which is no path"):
        resolve_sources(frame, home)


def test_table_without_paths_names_its_columns(home: Path) -> None:
    with pytest.raises(DatasetError, match=r"no column 'path', only \['file'\]"):
        resolve_sources(pd.DataFrame({"file": ["a"]}), home)


def test_two_tables_of_one_call_are_told_apart(home: Path) -> None:
    frames = [pd.DataFrame({"path": [name]}) for name in ("/a", "/b")]

    sources = resolve_sources([frames[0], "cats", frames[1]], home)

    assert [s.name for s in sources] == ["table", "cats", "table 2"]
    with pytest.raises(DatasetError, match="given twice"):
        resolve_sources([frames[0], frames[0].copy()], home)


def test_source_survives_the_trip_to_another_process(home: Path) -> None:
    for source in (
        Source("a", root=b"/\xff"),
        Source("b", entries=((b"/\xff", None), (b"/x", "é")), origin="/l.txt"),
    ):
        assert Source.from_json(source.to_json()) == source


def test_datasets_are_the_folders_that_are_not_hidden(home: Path) -> None:
    (home / "ants").mkdir()
    (home / ".hidden").mkdir()
    (home / "file").touch()
    os.mkdir(os.fsencode(home) + b"/\xff")

    names = [name for name, _ in list_datasets(home)]

    assert names == [r"\xff", "ants", "cats"]
    assert list_datasets(home / "missing") == []


def test_folder_of_the_datasets_that_cannot_be_listed_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(DatasetError, match=r"cannot list.*TOOLKIT_DATASETS_DIR"):
        list_datasets(tmp_path / "file")
