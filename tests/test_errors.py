"""The tree of errors: drawn as it is, whole after a trip between processes, with the cure."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest

from toolkit import errors
from toolkit.errors import (
    AccountingError,
    DiskFullError,
    EncoderMismatchError,
    FormatVersionError,
    IndexConflictError,
    IndexNotFoundError,
    RoadError,
    RunError,
    ServerError,
    SettingError,
    ToolkitError,
    UnknownSettingError,
    UsageError,
    WeightsNotFoundError,
)


def all_errors(root: type[ToolkitError] = ToolkitError) -> list[type[ToolkitError]]:
    """Every class of the tree, the root first."""
    return [root, *(error for child in root.__subclasses__() for error in all_errors(child))]


#: What each class with a shape of its own is made of; the others take one sentence.
ARGUMENTS: dict[type[ToolkitError], tuple[Any, ...]] = {
    SettingError: ("REDIS_PORT", "many", "a whole number", "$REDIS_PORT"),
    UnknownSettingError: ("redis_hots", None, "redis_host", "tk.configure"),
    WeightsNotFoundError: ("vit_base", "hub: no network"),
    EncoderMismatchError: ("cats", "1280-d vectors of a", "768-d of b"),
    IndexNotFoundError: ("cats", ("dogs", "birds")),
    IndexConflictError: ("cats", "was built from a, not b"),
    DiskFullError: ("/data", 5_000_000, 1_000_000),
    ServerError: ("redis://10.0.0.5:6379", "refused", "nothing listens there"),
    FormatVersionError: ("/data/catalog.sqlite", 9, 1),
}


def made(error: type[ToolkitError]) -> ToolkitError:
    if issubclass(error, RunError):
        return error("it ended", "20260101-000000-abcdef")
    return error(*ARGUMENTS.get(error, ("one sentence",)))


def test_tree_in_the_docstring_is_the_tree() -> None:
    drawn: list[tuple[str, str]] = []
    parents: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^ {4}([ │├└─]*)(\w+Error)\b", line)
        if match:
            depth, name = len(match[1]) // 4, match[2]
            drawn.append((name, parents.get(depth - 1, "Exception")))
            parents[depth] = name

    real = [(error.__name__, error.__bases__[0].__name__) for error in all_errors()]

    assert sorted(drawn) == sorted(real)


def test_every_public_class_of_the_room_is_in_the_tree() -> None:
    public = {value for value in vars(errors).values() if isinstance(value, type)}

    assert public == set(all_errors())


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_error_survives_the_trip_between_processes(error: type[ToolkitError]) -> None:
    before = made(error)

    after = pickle.loads(pickle.dumps(before))

    assert type(after) is error
    assert str(after) == str(before) != ""
    assert vars(after) == vars(before)


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_error_says_what_it_is_for(error: type[ToolkitError]) -> None:
    assert (error.__doc__ or "").strip()
    assert error.__name__.endswith("Error")


def test_attributes_are_what_the_error_was_made_of() -> None:
    for error, arguments in ARGUMENTS.items():
        assert tuple(vars(made(error)).values()) == arguments, error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SettingError, ["REDIS_PORT='many'", "$REDIS_PORT", "use a whole number"]),
        (WeightsNotFoundError, ["toolkit model pull vit_base", "checkpoint_path=", "pretrained"]),
        (EncoderMismatchError, ["'cats'", "1280-d", "768-d", "rebuild"]),
        (IndexNotFoundError, ["'cats'", "dogs, birds"]),
        (IndexConflictError, ["'cats'", "replace=True"]),
        (DiskFullError, ["5 MB are needed", "1 MB are free", "toolkit store gc", "untouched"]),
        (FormatVersionError, ["format 9", "up to 1", "upgrade"]),
    ],
)
def test_message_holds_the_values_and_the_cure(error: type[ToolkitError], words: list[str]) -> None:
    message = str(made(error))

    assert [word for word in words if word not in message] == []


def test_index_not_found_names_ten_and_says_that_there_are_more() -> None:
    names = tuple(f"index{n}" for n in range(11))

    message = str(IndexNotFoundError("x", names))

    assert "index9" in message
    assert "index10" not in message
    assert message.endswith("…")
    assert "toolkit build" in str(IndexNotFoundError("x"))


def test_only_the_road_may_move_work() -> None:
    roads = {error.__name__ for error in all_errors() if issubclass(error, RoadError)}

    assert roads == {
        "RoadError",
        "ExecutorDiedError",
        "ExecutorStalledError",
        "ExecutorUnavailableError",
        "ServerError",
        "WorkerLostError",
        "AnswerError",
    }
    assert not issubclass(RoadError, (UsageError, errors.ImageError))
    assert issubclass(AccountingError, RunError)
