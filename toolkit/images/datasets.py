"""What a dataset is: a folder by its name, any folder by its path, or a list of files."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from toolkit.errors import DatasetError
from toolkit.records import show_path

#: What a caller may name as a dataset: a name, a path, a list file, or a DataFrame.
Dataset: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes] | Any"

#: Endings of file lists.
LIST_SUFFIXES = (".txt", ".csv")

_FRAME = "DataFrame"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A dataset, found: either a folder to walk or a list of files to take.

    Attributes:
        name: How items of it are marked in an index.
        root: The folder, absolute, as bytes; ``None`` for a list.
        entries: For a list: (absolute path, label or ``None``) in the order given.
        origin: Where a list came from, for messages and for telling sources apart.
    """

    name: str
    root: bytes | None = None
    entries: tuple[tuple[bytes, str | None], ...] = ()
    origin: str = ""

    @property
    def identity(self) -> str:
        """What makes this source the same one in a later build."""
        return show_path(self.root) if self.root is not None else f"list:{self.origin}"

    def to_json(self) -> dict[str, Any]:
        """The JSON form, for a build that runs in another process."""
        return {
            "name": self.name,
            "root": self.root.hex() if self.root is not None else None,
            "entries": [[path.hex(), label] for path, label in self.entries],
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Source:
        """Read back :meth:`to_json`."""
        root = bytes.fromhex(value["root"]) if value["root"] is not None else None
        entries = tuple((bytes.fromhex(path), label) for path, label in value["entries"])
        return cls(value["name"], root, entries, value["origin"])


def resolve_sources(datasets: Dataset | Sequence[Dataset], datasets_dir: Path) -> list[Source]:
    """Find what the caller named.

    A bare name is looked up under ``datasets_dir`` first, then as a path; ``./name`` is
    always a path. Two datasets of one name are told apart by their whole paths.

    Args:
        datasets: One dataset or several: names, folders, list files, DataFrames with a
            ``path`` column and, if wanted, a ``label`` column.
        datasets_dir: Where datasets that have names lie.

    Raises:
        DatasetError: If one is missing, named twice, or a list cannot be read.
    """
    if isinstance(datasets, Sequence) and not isinstance(datasets, (str, bytes)):
        given: list[Any] = list(datasets)
    else:
        given = [datasets]
    if not given:
        raise DatasetError("no dataset was named; give a name, a folder or a list of files")
    sources = _numbered([_resolve(dataset, datasets_dir) for dataset in given])
    identities = [source.identity for source in sources]
    for identity in identities:
        if identities.count(identity) > 1:
            raise DatasetError(f"{identity} was given twice; name it once")
    names = [source.name for source in sources]
    return [
        dataclasses.replace(source, name=source.identity)
        if names.count(source.name) > 1
        else source
        for source in sources
    ]


def list_datasets(datasets_dir: Path) -> list[tuple[str, Path]]:
    """Name and folder of every dataset that has a name, sorted.

    Raises:
        DatasetError: If the folder of the datasets cannot be listed.
    """
    try:
        entries = list(datasets_dir.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DatasetError(
            f"cannot list the datasets in {datasets_dir}: {error.strerror}; set "
            "TOOLKIT_DATASETS_DIR to the folder whose folders are the datasets"
        ) from error
    return sorted(
        (show_path(os.fsencode(entry.name)), entry)
        for entry in entries
        if entry.is_dir() and not entry.name.startswith(".")
    )


def folder_label(path: bytes) -> str:
    """The label of a file without one of its own: the name of the folder it lies in."""
    return show_path(os.path.basename(os.path.dirname(path)))


def _resolve(dataset: Dataset, datasets_dir: Path) -> Source:
    if hasattr(dataset, "columns"):
        return _from_frame(dataset)
    if not isinstance(dataset, (str, bytes, os.PathLike)):
        raise DatasetError(
            f"a dataset is a name, a folder, a list file or a DataFrame, not {dataset!r}"
        )
    raw = os.fsencode(dataset)
    if not raw:
        raise DatasetError("a dataset has an empty name")
    if os.sep.encode() not in raw and raw not in (b".", b".."):
        named = os.path.abspath(os.path.join(os.fsencode(datasets_dir), raw))
        if os.path.isdir(named):
            return Source(name=show_path(raw), root=named)
    path = os.path.abspath(os.path.expanduser(raw))
    if os.path.isdir(path):
        return Source(name=show_path(os.path.basename(path) or path), root=path)
    if os.path.isfile(path) and path.lower().endswith(tuple(s.encode() for s in LIST_SUFFIXES)):
        return Source(
            name=show_path(os.path.splitext(os.path.basename(path))[0]),
            entries=_read_list(path),
            origin=show_path(path),
        )
    raise _missing(show_path(raw), datasets_dir)


def _missing(name: str, datasets_dir: Path) -> DatasetError:
    names = ", ".join(n for n, _ in list_datasets(datasets_dir)[:10]) or "none"
    return DatasetError(
        f"no dataset {name!r}: it is neither a folder under {datasets_dir} (there: {names}), nor a "
        "folder or a .txt or .csv list of its own; check the name, or set TOOLKIT_DATASETS_DIR"
    )


def _numbered(sources: list[Source]) -> list[Source]:
    """Tell the tables of one call apart by their order: a DataFrame has no name of its own."""
    tables = [source for source in sources if source.origin == _FRAME]
    numbers = [tables.index(source) if source in tables else 0 for source in sources]
    return [
        dataclasses.replace(source, name=f"{source.name} {n + 1}", origin=f"{_FRAME} {n + 1}")
        if n
        else source
        for source, n in zip(sources, numbers, strict=True)
    ]


def _from_frame(frame: Any) -> Source:
    import pandas as pd  # 0.3 s that only who has a DataFrame pays, and has paid

    if "path" not in frame.columns:
        raise DatasetError(f"the DataFrame has no column 'path', only {list(frame.columns)}")
    labels: Iterable[Any] = frame["label"] if "label" in frame.columns else [None] * len(frame)
    entries = []
    for path, label in zip(frame["path"], labels, strict=True):
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise DatasetError(f"the DataFrame's column 'path' holds {path!r}, which is no path")
        text = None if pd.isna(label) else str(label)
        entries.append(_entry(os.fsencode(path), text, os.getcwdb(), _FRAME))
    return Source(name="table", entries=tuple(entries), origin=_FRAME)


def _read_list(path: bytes) -> tuple[tuple[bytes, str | None], ...]:
    folder, where = os.path.dirname(path), show_path(path)
    try:
        with open(path, "rb") as file:
            data = file.read().removeprefix(codecs.BOM_UTF8)
        if path.lower().endswith(b".txt"):
            lines = [line.rstrip(b"\r") for line in data.split(b"\n")]
            return tuple(_entry(line, None, folder, where) for line in lines if line.strip())
        # surrogateescape carries the bytes of names that are not UTF-8 through the csv module.
        text = io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")
        rows = csv.DictReader(text)
        if "path" not in (rows.fieldnames or []):
            raise DatasetError(f"{where} has no column 'path' in its first line")
        entries = []
        for row in rows:
            if not row["path"]:
                raise DatasetError(f"{where}, line {rows.line_num}: there is no path")
            entries.append(_entry(os.fsencode(row["path"]), row.get("label"), folder, where))
        return tuple(entries)
    except (OSError, csv.Error) as error:
        raise DatasetError(f"cannot read the list {where}: {error}") from error


def _entry(path: bytes, label: str | None, folder: bytes, where: str) -> tuple[bytes, str | None]:
    if b"\0" in path:
        raise DatasetError(
            f"{where} holds a path with a zero byte, {show_path(path)!r}: if it is a list saved "
            "as UTF-16, save it as UTF-8"
        )
    # The label is kept as text that a database takes, whatever bytes it came as.
    shown = show_path(os.fsencode(label)) if label else None
    return os.path.abspath(os.path.join(folder, path)), shown
