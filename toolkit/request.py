"""A build as it was asked for, and what it would do: values only, both with a JSON form."""

from __future__ import annotations

import dataclasses
from typing import Any

from toolkit.embedding.spec import EncoderRequest
from toolkit.images.datasets import Source
from toolkit.images.walk import DEFAULT_EXCLUDES
from toolkit.planning import Changes


@dataclasses.dataclass(frozen=True, slots=True)
class BuildRequest:
    """One call of ``build_index``, resolved; its JSON form makes the same call again.

    Attributes:
        sources: The datasets, found.
        name: The index.
        encoder: The model and what was asked of it.
        include: Patterns of which a file must match one; none means every image.
        exclude: Patterns that leave files out.
        limit: Take only that many images.
        dtype: Precision of the search graph: ``f32``, ``f16`` or ``i8``.
        retry_failed: Try again what is known to be no picture.
        replace: Build anew over an index with other sources or another encoder.
        accept_changes: Publish whatever the guard would hold.
        accept_losses: Publish losses up to these: images removed, files failing.
        distributed: ``True``: workers if they work; ``False``: local; ``"require"``: workers.
    """

    sources: tuple[Source, ...]
    name: str
    encoder: EncoderRequest
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = DEFAULT_EXCLUDES
    limit: int | None = None
    dtype: str = "f16"
    retry_failed: bool = False
    replace: bool = False
    accept_changes: bool = False
    accept_losses: tuple[int, int] | None = None
    distributed: bool | str = True

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sources = [source.to_json() for source in self.sources]
        return {**plain, "sources": sources, "encoder": self.encoder.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BuildRequest:
        """Read back :meth:`to_json`."""
        return cls(
            **{
                **value,
                "sources": tuple(Source.from_json(s) for s in value["sources"]),
                "encoder": EncoderRequest.from_json(value["encoder"]),
                "include": tuple(value["include"]),
                "exclude": tuple(value["exclude"]),
                "accept_losses": tuple(value["accept_losses"] or ()) or None,
            }
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PlanReport:
    """What a build would do; ``--dry-run`` prints it.

    Attributes:
        changes: How the files differ from the published index.
        found: Every regular file that was met.
        excluded: Files left out, by rule.
        failed: Files that are known to fail.
        reused: Contents whose vector is stored.
        to_embed: Images that would go through the model.
        seconds: Estimate for these from the last build with this encoder, or ``None``.
        needed_bytes: What the build would write.
        free_bytes: What the disk has.
        held: Why the guard would hold it, or ``None``.
    """

    changes: Changes
    found: int
    excluded: dict[str, int]
    failed: int
    reused: int
    to_embed: int
    seconds: float | None
    needed_bytes: int
    free_bytes: int
    held: str | None
