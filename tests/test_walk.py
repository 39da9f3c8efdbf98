"""Every regular file of a dataset is met once, and has a name for why it is not taken."""

from __future__ import annotations

import collections
import json
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.images.datasets import Source
from toolkit.images.walk import Excluded, Found, Rules, Unreadable, walk
from toolkit.records import FailureKind

#: Root reads whatever it likes; without these capabilities it is refused like anybody else.
_DROP = "-dac_override,-dac_read_search"
_AS_ROOT = ("setpriv", f"--bounding-set={_DROP}", f"--inh-caps={_DROP}")
DENIED = _AS_ROOT if os.geteuid() == 0 else ()


def folder(root: Path, *names: str | bytes) -> Source:
    """A dataset with these files, each a byte long; a name may have folders in it."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")
    root.mkdir(exist_ok=True)
    return Source("d", root=os.fsencode(root))


def told(
    source: Source, rules: Rules | None = None, *, follow_links: bool = False
) -> dict[str, str]:
    """Path below the dataset to what was said of it; a path met twice is an error."""
    answer = {}
    for entry in walk(source, rules or Rules(), follow_links=follow_links):
        name = os.fsdecode(os.path.relpath(entry.path, source.root or b"/"))
        assert name not in answer, f"{name} was met twice"
        match entry:
            case Found():
                answer[name] = "found"
            case Excluded(rule=rule):
                answer[name] = rule
            case Unreadable(kind=kind):
                answer[name] = kind
    return answer


def told_while_denied(root: Path) -> list[list[str]]:
    """Kind, path and reason of each entry, as a user sees them who may not read everything."""
    script = (
        "import json, os, sys\n"
        "from toolkit.images.datasets import Source\n"
        "from toolkit.images.walk import Rules, walk\n"
        "root = os.fsencode(sys.argv[1])\n"
        "print(json.dumps([[type(e).__name__, os.fsdecode(os.path.relpath(e.path, root)),\n"
        "    getattr(e, 'reason', '') or getattr(e, 'rule', '')]\n"
        "    for e in walk(Source('d', root=root), Rules())]))\n"
    )
    command = [*DENIED, sys.executable, "-c", script, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: list[list[str]] = json.loads(done.stdout)
    return sorted(found)


NAMES = st.sampled_from(
    "a.jpg B.PNG c.txt .hidden ._x.jpg d.mp4 e.cr2 f @eaDir .thumbnails n.xmp g.jpeg".split()
)
ACTIONS = st.sampled_from(["file", "folder", "link to file", "link to folder", "link to nothing"])


def grown(root: Path, plan: list[tuple[str, str, int]]) -> None:
    """Make a tree: each step adds something to one of the folders there are."""
    folders = [root]
    (root.parent / "outside").mkdir()
    (root.parent / "outside" / "o.jpg").touch()
    for name, action, where in plan:
        path = folders[where % len(folders)] / name
        if os.path.lexists(path):
            continue
        match action:
            case "file":
                path.touch()
            case "folder":
                path.mkdir()
                folders.append(path)
            case "link to file":
                path.symlink_to(root.parent / "outside" / "o.jpg")
            case "link to folder":
                path.symlink_to(folders[where // 7 % len(folders)])
            case _:
                path.symlink_to("nowhere")


def by_hand(root: Path) -> set[str]:
    """Every regular file and every link, as os.walk has them."""
    return {
        os.path.relpath(os.path.join(top, name), root)
        for top, folders, files in os.walk(root)
        for name in files + [f for f in folders if os.path.islink(os.path.join(top, f))]
    }


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(NAMES, ACTIONS, st.integers(0, 999)), max_size=40))
def test_every_file_and_link_is_met_once(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, str, int]]
) -> None:
    root = tmp_path_factory.mktemp("tree") / "root"
    root.mkdir()
    grown(root, plan)

    answer = told(Source("d", root=os.fsencode(root)))
    followed = told(Source("d", root=os.fsencode(root)), follow_links=True)

    assert answer.keys() == by_hand(root)
    real = {name for name, said in answer.items() if not (root / name).is_symlink()}
    assert real <= followed.keys()
    assert {followed[name] for name in real} == {answer[name] for name in real}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("@eaDir/SYNOPHOTO_THUMB_S.jpg", "@eaDir"),
        ("a/@eadir/x.jpg", "@eaDir"),
        ("._a.jpg", "._*"),
        (".thumbnails/a.jpg", ".thumbnails"),
        (".a.jpg", "hidden"),
        (".cache/deep/er/a.jpg", "hidden"),
        ("a.MP4", "videos"),
        ("a.mov", "videos"),
        ("a.jpg.xmp", "sidecars"),
        ("Thumbs.db", "sidecars"),
        ("a.CR2", "RAW"),
        ("a.dng", "RAW"),
        ("readme.txt", "not an image"),
        ("jpg", "not an image"),
        ("a.jpg.part", "not an image"),
        ("a.jpg", "found"),
        ("a.JPeG", "found"),
        ("a.b.heic", "found"),
        ("my.mp4s/a.jpg", "found"),
        ("a/b/c.webp", "found"),
    ],
)
def test_default_rules(tmp_path: Path, name: str, rule: str) -> None:
    assert told(folder(tmp_path / "d", name)) == {name: rule}


def test_pattern_without_a_slash_is_matched_against_each_name_on_the_way(tmp_path: Path) -> None:
    names = ["old/a.jpg", "b/OLD/c.jpg", "older/d.jpg", "e-old.jpg"]

    answer = told(folder(tmp_path / "d", *names), Rules(exclude=["old", "e-*"]))

    assert answer == dict(zip(names, ["old", "old", "found", "e-*"], strict=True))


def test_pattern_with_a_slash_is_matched_against_the_whole_path(tmp_path: Path) -> None:
    names = ["raw/a.jpg", "raw/b/c.jpg", "x/raw/d.jpg", "raw.jpg"]

    answer = told(folder(tmp_path / "d", *names), Rules(exclude=["raw/*"]))

    assert answer == dict(zip(names, ["raw/*", "raw/*", "found", "found"], strict=True))


def test_first_pattern_that_matches_names_the_file(tmp_path: Path) -> None:
    names = ("raw/a.jpg", "raw/b.jpg", "c.jpg", "d.png", "e.gif")
    exclude = ("?.jp[eg]", "a*", "raw/*", "*/b.jpg", "c.*", "*.png", "d*")

    for first in range(len(exclude)):
        answer = told(folder(tmp_path / str(first), *names), Rules(exclude=exclude[first:]))

        said = [answer[name] for name in names]
        assert said == [
            next((p for p in exclude[first:] if p in matching), "found")
            for matching in (
                ("?.jp[eg]", "a*", "raw/*"),
                ("?.jp[eg]", "raw/*", "*/b.jpg"),
                ("?.jp[eg]", "c.*"),
                ("*.png", "d*"),
                (),
            )
        ]


def test_include_takes_what_matches_and_names_the_rest(tmp_path: Path) -> None:
    names = ["cats/a.jpg", "cats/deep/b.png", "dogs/c.jpg", "dogs/cat.jpg", "cats/n.txt"]

    by_folder = told(folder(tmp_path / "d", *names), Rules(include=["CATS"]))
    by_path = told(folder(tmp_path / "d"), Rules(include=["dogs/*", "*.png"]))

    assert list(map(by_folder.get, names)) == [
        *["found", "found", "not included", "not included", "not an image"]
    ]
    assert list(map(by_path.get, names)) == [
        *["not included", "found", "found", "found", "not an image"]
    ]


def test_include_matches_no_name_above_the_dataset(tmp_path: Path) -> None:
    answer = told(folder(tmp_path / "cats", "a.jpg"), Rules(include=["cats"]))

    assert answer == {"a.jpg": "not included"}


@pytest.mark.parametrize(
    "name",
    ["猫/фото.jpg", "عکس.png", "e\u0301.jpg", "🐈.webp", "a b\tc.jpg", "two\nlines.jpg", "[x].jpg"],
)
def test_names_in_any_script_are_found_with_their_label(tmp_path: Path, name: str) -> None:
    source = folder(tmp_path / "d", name)

    (found,) = walk(source, Rules())

    assert isinstance(found, Found)
    assert found.path == os.fsencode(tmp_path / "d" / name)
    assert found.label == (os.path.dirname(name) or "d")
    assert found.stat.size == 1


def test_names_that_are_not_text_are_found_and_ruled(tmp_path: Path) -> None:
    source = folder(tmp_path / "d", b"\xff/\xfe.jpg", b"\xfd.mp4", b"._\xff.jpg")

    (found,) = [e for e in walk(source, Rules()) if isinstance(e, Found)]
    rules = {e.path[-6:]: e.rule for e in walk(source, Rules()) if isinstance(e, Excluded)}

    assert found.path == os.fsencode(tmp_path) + b"/d/\xff/\xfe.jpg"
    assert found.label == r"\xff"
    assert rules == {b"/\xfd.mp4": "videos", b"_\xff.jpg": "._*"}


def test_links_are_counted_and_not_followed(tmp_path: Path) -> None:
    source = folder(tmp_path / "d", "a.jpg", "sub/b.jpg")
    (tmp_path / "d" / "file.jpg").symlink_to("a.jpg")
    (tmp_path / "d" / "folder").symlink_to("sub")
    (tmp_path / "d" / "loop").symlink_to(".")
    (tmp_path / "d" / "self").symlink_to("self")
    (tmp_path / "d" / ".hidden").symlink_to("a.jpg")

    answer = told(source)

    links = dict.fromkeys(["file.jpg", "folder", "loop", "self"], "link")
    assert answer == {"a.jpg": "found", "sub/b.jpg": "found", ".hidden": "hidden", **links}


def test_links_are_followed_when_asked_and_loops_end(tmp_path: Path) -> None:
    source = folder(tmp_path / "d", "a.jpg", "sub/b.jpg")
    folder(tmp_path / "outside", "c.jpg")
    (tmp_path / "d" / "0 first").symlink_to("sub")
    (tmp_path / "d" / "file.jpg").symlink_to("a.jpg")
    (tmp_path / "d" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "self").symlink_to("self")
    (tmp_path / "d" / "broken.jpg").symlink_to("nothing")

    answer = told(source, follow_links=True)

    assert answer == {
        "a.jpg": "found",
        # By its own path, though the link comes first in the alphabet.
        "sub/b.jpg": "found",
        "file.jpg": "found",
        "out/c.jpg": "found",
        "self": "unreadable",
        "broken.jpg": "changed",
    }


@pytest.mark.parametrize("seed", range(8))
def test_folder_with_two_links_to_it_has_the_same_path_each_time(tmp_path: Path, seed: int) -> None:
    folder(tmp_path / "outside", "c.jpg")
    names = [f"link{n}" for n in range(6)]
    random.Random(seed).shuffle(names)
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).symlink_to(tmp_path / "outside")

    answer = told(folder(tmp_path / "d"), follow_links=True)

    assert answer == {"link0/c.jpg": "found"}


def test_folder_without_permission_is_one_failure_with_its_reason(tmp_path: Path) -> None:
    folder(tmp_path / "d", "a.jpg", "closed/b.jpg", "closed/c.jpg", ".Trash/x.jpg", "blind/e.jpg")
    for name, mode in [("closed", 0), (".Trash", 0), ("blind", stat.S_IRUSR)]:
        (tmp_path / "d" / name).chmod(mode)

    answer = told_while_denied(tmp_path / "d")

    for name in ("closed", ".Trash", "blind"):
        (tmp_path / "d" / name).chmod(0o755)
    # A folder that can be listed and not entered: its files cannot even be asked.
    assert answer == [
        ["Excluded", ".Trash", "hidden"],
        ["Found", "a.jpg", ""],
        ["Unreadable", "blind/e.jpg", "cannot be read: Permission denied (EACCES)"],
        ["Unreadable", "closed", "cannot be read: Permission denied (EACCES)"],
    ]


def test_dataset_that_vanished_is_unreadable_not_empty(tmp_path: Path) -> None:
    (entry,) = walk(Source("d", root=os.fsencode(tmp_path / "gone")), Rules())

    assert isinstance(entry, Unreadable)
    assert (entry.kind, entry.label) == (FailureKind.UNREADABLE, "gone")
    assert "ENOENT" in entry.reason


def test_what_is_no_regular_file_is_passed_over_without_waiting(tmp_path: Path) -> None:
    source = folder(tmp_path / "d", "a.jpg")
    os.mkfifo(tmp_path / "d" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("d/socket.jpg")

        assert told(source) == {"a.jpg": "found"}


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A tree of 2,000 folders; its bottom has a path longer than the system takes."""
    # Not below tmp_path, which pytest removes by recursion and would be killed by.
    root = Path(tempfile.mkdtemp(prefix="deep-"))
    os.chdir(root)
    for n in range(2000):
        os.mkdir("dd")
        os.chdir("dd")
        if n % 500 == 0:
            Path("a.jpg").touch()
    os.chdir(tmp_path)
    yield root
    subprocess.run(["rm", "-rf", root], check=True)


def test_very_deep_tree_is_walked_as_far_as_the_system_can_name_it(deep: Path) -> None:
    entries = list(walk(Source("d", root=os.fsencode(deep)), Rules()))

    kinds = collections.Counter(type(entry) for entry in entries)
    (last,) = [entry for entry in entries if isinstance(entry, Unreadable)]
    # Folders 1, 501 and 1001 lie within 4,096 bytes; below that nothing is lost in silence.
    assert kinds == {Found: 3, Unreadable: 1}
    assert "ENAMETOOLONG" in last.reason
    assert last.kind is FailureKind.UNREADABLE


def test_listed_files_are_taken_whatever_the_rules_say(tmp_path: Path) -> None:
    folder(tmp_path / "d", ".hidden.jpg", "text.txt", "a.jpg")
    (tmp_path / "d" / "link.jpg").symlink_to("a.jpg")
    paths = [os.fsencode(tmp_path / "d" / n) for n in (".hidden.jpg", "text.txt", "link.jpg")]
    labels = ["mine", None, ""]
    source = Source("l", entries=tuple(zip(paths, labels, strict=True)))

    found = list(walk(source, Rules(exclude=["*"])))

    assert [(e.path, e.label) for e in found if isinstance(e, Found)] == [
        *zip(paths, ["mine", "d", ""], strict=True)
    ]


def test_listed_file_that_is_gone_keeps_no_vector_and_a_refused_one_does(tmp_path: Path) -> None:
    folder(tmp_path / "d", "a.jpg")
    (tmp_path / "d" / "self").symlink_to("self")
    names = ["gone.jpg", "a.jpg/x.jpg", "self", "."]
    source = Source("l", entries=tuple((os.fsencode(tmp_path / "d" / n), "x") for n in names))

    said = [(e.kind, e.reason) for e in walk(source, Rules()) if isinstance(e, Unreadable)]

    assert said == [
        (FailureKind.CHANGED, "cannot be read: No such file or directory (ENOENT)"),
        (FailureKind.CHANGED, "cannot be read: Not a directory (ENOTDIR)"),
        (FailureKind.UNREADABLE, "cannot be read: Too many levels of symbolic links (ELOOP)"),
        (FailureKind.UNREADABLE, "is not a regular file"),
    ]
