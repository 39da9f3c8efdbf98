"""How what others wrote on the server is read: garbage is passed over, never an error."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import redis
from redis.client import Pipeline


def answers(pipe: Pipeline) -> list[Any]:
    """Answers of a pipeline; ``None`` where a key holds something of another type."""
    said = list(pipe.execute(raise_on_error=False))
    for n, answer in enumerate(said):
        if isinstance(answer, Exception):
            said[n] = None
            with pass_over_wrong_type():
                raise answer
    return said


@contextlib.contextmanager
def pass_over_wrong_type() -> Iterator[None]:
    """End a block early where a key holds something of another type."""
    try:
        yield
    except redis.ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise


def json_value(text: bytes | str | None) -> Any:
    """What a text holds as JSON; ``None`` if it is none."""
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


def json_object(text: bytes | str | None) -> dict[str, Any] | None:
    """The JSON object that a text holds, if it does."""
    value = json_value(text)
    return value if isinstance(value, dict) else None


def shown(name: bytes) -> str:
    """A name on the server as text."""
    return name.decode("utf-8", "backslashreplace")


def literal(text: str) -> str:
    """A text as part of a pattern of SCAN that stands for itself."""
    return re.sub(r"([\\*?\[\]^])", r"\\\1", text)


def seconds(time: tuple[int, int]) -> float:
    """The server's clock, as TIME gives it."""
    whole, micros = time
    return whole + micros / 1e6
