"""Walk a dataset and say of every file whether it is taken, left out by a rule, or unreadable.

Law: every regular file is yielded once; nothing is skipped without a name for why.
"""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import heapq
import itertools
import os
import re
import stat
from collections.abc import Iterator, Sequence

from toolkit.images.datasets import Source, folder_label
from toolkit.images.decode import IMAGE_SUFFIXES
from toolkit.records import FailureKind, FileStat, show_path

#: What a build leaves out unless told otherwise, as (rule, pattern). A pattern without a
#: slash is matched against every folder and file name on the way, case-insensitively; one
#: with a slash against the whole path below the dataset.
_RULES = (
    ("@eaDir", ("@eaDir",)),
    ("._*", ("._*",)),
    (".thumbnails", (".thumbnails",)),
    ("hidden", (".*",)),
    ("videos", ("*.mp4", "*.mov", "*.avi", "*.mkv", "*.m4v", "*.webm", "*.mpg", "*.3gp")),
    ("sidecars", ("*.xmp", "*.aae", "*.thm", "*.pp3", "*.json", "thumbs.db", "desktop.ini")),
    ("RAW", ("*.cr2", "*.cr3", "*.nef", "*.arw", "*.dng", "*.raf", "*.orf", "*.rw2")),
)  # fmt: skip
DEFAULT_EXCLUDES: tuple[str, ...] = tuple(pattern for _, group in _RULES for pattern in group)
_RULE_OF = {pattern: rule for rule, group in _RULES for pattern in group}

#: Rules that are not patterns.
RULE_LINK = "link"
RULE_OTHER = "not an image"
RULE_INCLUDE = "not included"
RULE_LIMIT = "over the limit"
RULE_TWICE = "named twice"


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A file that is taken."""

    path: bytes
    label: str
    stat: FileStat


@dataclasses.dataclass(frozen=True, slots=True)
class Excluded:
    """A file that a rule leaves out."""

    path: bytes
    rule: str


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """A folder that cannot be listed, or a file that cannot be asked; one found, one failed.

    Attributes:
        path: The folder or file.
        label: Name of the folder it lies in, or its own when it is one.
        reason: One sentence for a person.
        kind: ``changed`` when the file is gone: then no old vector is kept.
    """

    path: bytes
    label: str
    reason: str
    kind: FailureKind = FailureKind.UNREADABLE


class Rules:
    """Which files a build takes.

    Args:
        include: Patterns of which one must match; none means every image.
        exclude: Patterns of which none may match.
    """

    def __init__(
        self, include: Sequence[str] = (), exclude: Sequence[str] = DEFAULT_EXCLUDES
    ) -> None:
        self._include = [(_compile([pattern]), "/" in pattern) for pattern in include]
        # One expression for all in a row that are for names, or for whole paths: a million
        # files meet each of them.
        self._exclude: list[tuple[re.Pattern[str], bool, list[str]]] = []
        for whole, group in itertools.groupby(exclude, key=lambda pattern: "/" in pattern):
            patterns = list(group)
            rules = [_RULE_OF.get(pattern, pattern) for pattern in patterns]
            self._exclude.append((_compile(patterns), whole, rules))

    def excluded_by(self, relative: bytes) -> str | None:
        """The rule that leaves out a name or path below the dataset, or ``None``."""
        path = _text(relative)
        name = path.rpartition("/")[2]
        for regex, whole, rules in self._exclude:
            if match := regex.fullmatch(path if whole else name):
                assert match.lastindex  # a group for each pattern
                return rules[match.lastindex - 1]
        return None

    def includes(self, relative: bytes) -> bool:
        """Whether a file that no rule leaves out is asked for."""
        if not self._include:
            return True
        path = _text(relative)
        names = path.split("/")
        return any(
            regex.fullmatch(path) if whole else any(regex.fullmatch(name) for name in names)
            for regex, whole in self._include
        )


def walk(
    source: Source, rules: Rules, *, follow_links: bool = False
) -> Iterator[Found | Excluded | Unreadable]:
    """Every file of a dataset, in no promised order.

    Links are counted and not followed unless asked; then a folder reached twice is listed
    once, by its own path where that leads to it, so loops end. Paths are absolute bytes, as
    the file system has them.
    """
    if source.root is None:
        yield from _walk_list(source)
    else:
        yield from _Walker(source.root, rules, follow_links).entries()


class _Walker:
    def __init__(self, root: bytes, rules: Rules, follow_links: bool) -> None:
        self._root, self._rules, self._follow_links = root, rules, follow_links
        # Folders to list, each with the rule that leaves out all below it. A stack of our own:
        # a tree may be deeper than Python's.
        self._folders: list[tuple[bytes, str | None]] = [(root, None)]
        # Links come last and in order, or a folder's path would depend on the order of listing.
        self._links: list[tuple[bytes, str | None]] = []
        self._listed: set[tuple[int, int]] = set()

    def entries(self) -> Iterator[Found | Excluded | Unreadable]:
        while self._folders or self._links:
            path, rule = self._folders.pop() if self._folders else heapq.heappop(self._links)
            label = folder_label(path + b"/.")
            try:
                if self._follow_links and self._is_listed(path):
                    continue
                with os.scandir(path) as entries:
                    for entry in entries:
                        yield from self._entry(entry, label, rule)
            except OSError as error:
                # Nothing below a rule would have been taken: there it is no failure.
                yield Excluded(path, rule) if rule else Unreadable(path, label, _reason(error))

    def _is_listed(self, folder: bytes) -> bool:
        info = os.stat(folder)
        identity = (info.st_dev, info.st_ino)
        if identity in self._listed:
            return True
        self._listed.add(identity)
        return False

    def _entry(
        self, entry: os.DirEntry[bytes], label: str, rule: str | None
    ) -> Iterator[Found | Excluded | Unreadable]:
        relative = entry.path[len(self._root) :].lstrip(os.sep.encode())
        rule = rule or self._rules.excluded_by(relative)
        try:
            if entry.is_symlink() and not self._follow_links:
                yield Excluded(entry.path, rule or RULE_LINK)
            elif entry.is_dir():
                if entry.is_symlink():
                    heapq.heappush(self._links, (entry.path, rule))
                else:
                    self._folders.append((entry.path, rule))
            elif stat.S_ISREG((info := entry.stat()).st_mode):
                yield self._file(entry.path, label, relative, rule, info)
        except OSError as error:
            yield Excluded(entry.path, rule) if rule else _no_stat(entry.path, label, error)

    def _file(
        self, path: bytes, label: str, relative: bytes, rule: str | None, info: os.stat_result
    ) -> Found | Excluded:
        if rule is None and not _is_image_name(path):
            rule = RULE_OTHER
        if rule is None and not self._rules.includes(relative):
            rule = RULE_INCLUDE
        if rule is not None:
            return Excluded(path, rule)
        return Found(path, label, FileStat.of(info))


def _walk_list(source: Source) -> Iterator[Found | Unreadable]:
    # A file that is named is wanted: no rule leaves it out.
    for path, label in source.entries:
        label = label if label is not None else folder_label(path)
        try:
            info = os.stat(path)
        except OSError as error:
            yield _no_stat(path, label, error)
            continue
        if stat.S_ISREG(info.st_mode):
            yield Found(path, label, FileStat.of(info))
        else:
            yield Unreadable(path, label, "is not a regular file")


def _no_stat(path: bytes, label: str, error: OSError) -> Unreadable:
    gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
    kind = FailureKind.CHANGED if gone else FailureKind.UNREADABLE
    return Unreadable(path, label, _reason(error), kind)


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "error")
    return f"cannot be read: {error.strerror} ({name})"


def _is_image_name(path: bytes) -> bool:
    return os.path.splitext(path)[1].lower().decode("latin-1") in IMAGE_SUFFIXES


def _compile(patterns: Sequence[str]) -> re.Pattern[str]:
    """One expression for patterns that are all for names, or all for whole paths; a group each."""
    joined = "|".join(f"({fnmatch.translate(pattern)})" for pattern in patterns)
    return re.compile(joined, re.IGNORECASE)


def _text(relative: bytes) -> str:
    return show_path(relative).replace(os.sep, "/")
