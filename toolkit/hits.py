"""What a search found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from toolkit import display

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, slots=True)
class Hit:
    """One content that a search found.

    Attributes:
        rank: 1 for the nearest.
        score: Cosine similarity; higher is nearer.
        path: Its first file.
        dataset: Dataset of that file.
        paths: Every file with this content.
        label: Label of the first file.
        key: Row in the index.
        file: Path of the first file as the file system has it: ``path`` is for people, and
            names that are not text do not open by it.
    """

    rank: int
    score: float
    path: str
    dataset: str
    paths: tuple[str, ...]
    label: str
    key: int
    file: bytes

    def to_json(self) -> dict[str, Any]:
        """The keys that ``--json`` promises."""
        return {
            "rank": self.rank,
            "score": self.score,
            "path": self.path,
            "dataset": self.dataset,
            "paths": list(self.paths),
        }


class Hits(Sequence[Hit]):
    """The answer to a search, nearest first; thumbnails in a notebook.

    Attributes:
        exact: Whether every row was compared, rather than those the graph proposed.
    """

    def __init__(self, hits: Sequence[Hit], exact: bool) -> None:
        self._hits, self.exact = tuple(hits), exact

    def __len__(self) -> int:
        return len(self._hits)

    def __getitem__(self, place: Any) -> Any:
        return self._hits[place]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self._hits)

    def to_pandas(self) -> pd.DataFrame:
        """A row per hit: rank, score, path, dataset, paths, label, key, file."""
        import pandas as pd  # deferred: `import toolkit` is to take less than 0.3 s

        columns = [field.name for field in dataclasses.fields(Hit)]
        rows = [[getattr(hit, column) for column in columns] for hit in self]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        return display.hits_text(self)

    def _repr_html_(self) -> str:
        return display.hits_html(self)
