"""An index, opened: queries, tables and measures over one published version."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from toolkit import display
from toolkit.config import Settings
from toolkit.embedding.spec import IMPORTED, EncoderRequest, EncoderSpec
from toolkit.embedding_stage import last_rate
from toolkit.errors import EncoderMismatchError, IndexNotFoundError, QueryError
from toolkit.hits import Hit, Hits
from toolkit.images.identity import image_key
from toolkit.index import curate, quality
from toolkit.index.items import ItemRow
from toolkit.index.version import IndexVersion, open_current
from toolkit.places import index_dir
from toolkit.query import Query, embed_bytes, file_bytes
from toolkit.records import show_path

if TYPE_CHECKING:
    import pandas as pd

#: What may narrow a search: a dataset, a path pattern, or a mask over the rows.
Where: TypeAlias = "str | NDArray[np.bool_] | pd.Series[bool]"


class Index:
    """A published index, memory-mapped; it keeps the version it opened.

    Attributes:
        name: Its name.
    """

    def __init__(self, name: str, version: IndexVersion, settings: Settings) -> None:
        self.name, self._settings = name, settings
        self._open_version: IndexVersion | None = version

    @classmethod
    def open(cls, name: str, settings: Settings) -> Index:
        """See :func:`toolkit.open_index`."""
        folder = index_dir(settings.data_dir, name)
        try:
            return cls(name, open_current(folder), settings)
        except IndexNotFoundError:
            raise IndexNotFoundError(name, published_names(settings.data_dir)) from None

    def close(self) -> None:
        """Let go of the version; it may be removed then, once a newer one is published."""
        if self._open_version is not None:
            self._open_version.close()
            self._open_version = None

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.version.n

    @property
    def version(self) -> IndexVersion:
        """The published version it opened.

        Raises:
            QueryError: From here and from whatever needs it, once the index is closed.
        """
        if self._open_version is None:
            raise QueryError(f"index {self.name!r} is closed; open it again")
        return self._open_version

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.version.dim

    @property
    def encoder(self) -> EncoderSpec:
        """The encoder whose vectors it holds."""
        return EncoderSpec.from_json(self.version.manifest["encoder"]["spec"])

    @property
    def manifest(self) -> dict[str, Any]:
        """What was written beside it: counts, accounting, measured recall, versions."""
        return dict(self.version.manifest)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """float32, shape ``(n, dim)``, each row of length 1; read-only, memory-mapped."""
        return self.version.vectors

    @property
    def usearch(self) -> Any:
        """The raw usearch handle; its keys are the rows of :meth:`to_pandas`."""
        return self.version.graph.raw

    def search(
        self,
        query: Query,
        k: int = 12,
        *,
        include_self: bool = False,
        where: Where | None = None,
    ) -> Hits:
        """The images nearest to a picture or a vector.

        Args:
            query: A path, a PIL picture, an array of pixels ``(height, width, 3)``, or a
                vector ``(dim,)``. A picture that is indexed is not embedded again.
            k: Hits wanted; there may be fewer.
            include_self: Whether the query's own content may be among them.
            where: A dataset, a path pattern such as ``"cats/*"``, or a boolean mask over
                :meth:`to_pandas`.

        Returns:
            One hit per content, nearest first, ties by row.

        Raises:
            QueryError: If the query is no picture, or a vector of another kind.
            EncoderMismatchError: If it is a vector of another length, or the encoder here
                is not the one that made the index.
        """
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise QueryError(f"k={k!r}: ask for a whole number of hits, 1 or more")
        k = min(int(k), len(self)) or 1
        vector, own = self._vector_of(query)
        exclude = [[own] if own is not None and not include_self else []]
        found = self.version.search(vector[None], k, mask=self._mask(where), exclude=exclude)
        keys = [int(key) for key in found.keys[0] if key >= 0]
        rows = self.version.rows(keys)
        hits = [
            Hit(
                rank=place + 1,
                score=float(found.scores[0][place]),
                path=show_path(row.path),
                dataset=row.dataset,
                paths=tuple(show_path(copy.path) for copy in row.copies),
                label=row.label or "",
                key=key,
                file=row.path,
            )
            for place, (key, row) in enumerate(zip(keys, rows, strict=True))
        ]
        return Hits(hits, found.exact)

    def search_batch(
        self, vectors: NDArray[np.float32], k: int = 10
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Nearest rows of many vectors at once.

        Args:
            vectors: float32, shape ``(m, dim)``.
            k: Neighbours of each.

        Returns:
            Keys and scores, each of shape ``(m, k)``; ``-1`` and ``nan`` where there are
            fewer.

        Raises:
            EncoderMismatchError: If the vectors are of another length.
        """
        found = self.version.search(self._checked(np.atleast_2d(vectors)), k)
        return found.keys, found.scores

    def to_pandas(self) -> pd.DataFrame:
        """A row per content, aligned with :attr:`vectors`.

        Columns: key, dataset, path, paths, label, width, height.
        """
        import pandas as pd  # deferred: `import toolkit` is to take less than 0.3 s

        columns = ["key", "dataset", "path", "paths", "label", "width", "height"]
        rows = [
            (
                key,
                row.dataset,
                show_path(row.path),
                tuple(show_path(copy.path) for copy in row.copies),
                row.label or "",
                row.width,
                row.height,
            )
            for key, row in enumerate(self.version.iter_rows())
        ]
        return pd.DataFrame(rows, columns=columns)

    def duplicates(self) -> pd.DataFrame:
        """Contents that lie in more than one file: key, path of the first, paths of all."""
        table = self.to_pandas()
        return table[table["paths"].map(len) > 1][["key", "path", "paths"]].reset_index(drop=True)

    def near_duplicates(self, threshold: float = 0.95, other: Index | None = None) -> pd.DataFrame:
        """Pairs of different contents that look the same.

        Args:
            threshold: Least cosine similarity.
            other: Compare with this index instead of within itself.

        Returns:
            A row per pair, the most similar first: score, path_a, path_b, key_a, key_b.

        Raises:
            EncoderMismatchError: If the other index holds vectors of another encoder.
        """
        import pandas as pd  # deferred: `import toolkit` is to take less than 0.3 s

        if not isinstance(threshold, (int, float)) or not -1.0 <= threshold <= 1.0:
            raise QueryError(f"threshold={threshold!r}: a cosine similarity lies in [-1, 1]")
        if other is not None:
            self._same_encoder(other)
        against = other.version if other is not None else None
        a, b, score = curate.near_duplicates(self.version, threshold, against)
        paths_a = [show_path(row.path) for row in self.version.rows(a.tolist())]
        paths_b = [show_path(row.path) for row in (against or self.version).rows(b.tolist())]
        frame = pd.DataFrame(
            {"score": score, "path_a": paths_a, "path_b": paths_b, "key_a": a, "key_b": b}
        )
        return frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)

    def recall(self, k: int = 10) -> float:
        """Share of the true ``k`` nearest that the graph finds, on a sample of rows."""
        return quality.measure_recall(self.version, k=k)

    def label_precision(self, k: int = 1) -> float:
        """Leave-one-out precision at ``k``: how often a neighbour has the row's own label."""
        labels = [row.label or "" for row in self.version.iter_rows()]
        return quality.label_precision(self.vectors, labels, k=k)

    def map(self, sample: int = 20_000) -> pd.DataFrame:
        """The two directions in which the vectors differ most, for a scatter plot.

        Returns:
            A row per sampled content: key, x, y, label, path.
        """
        rows, xy = curate.project(self.vectors, sample)
        table = self.to_pandas().iloc[rows][["key", "label", "path"]].reset_index(drop=True)
        return table.assign(x=xy[:, 0], y=xy[:, 1])

    def summary(self) -> dict[str, Any]:
        """What lists of indexes show of it."""
        manifest = self.version.manifest
        return {
            "name": self.name,
            "images": len(self),
            "encoder": self.encoder.describe(),
            "dtype": manifest["dtype"],
            "recall_at_10": manifest["recall_at_10"],
            "sources": manifest["extra"]["sources"],
            "created": manifest["created"],
        }

    def __repr__(self) -> str:
        return display.index_text(self.summary())

    def _vector_of(self, query: Query) -> tuple[NDArray[np.float32], int | None]:
        """The vector of a query, and the row that holds its content, if one does."""
        if isinstance(query, np.ndarray) and query.ndim == 1:
            return self._checked(query[None])[0], None
        key = self._row_of_path(query)
        if key is None:
            data = file_bytes(query)
            key = self.version.key_of(image_key(data))
        if key is not None:
            return np.asarray(self.vectors[key]), key
        request = EncoderRequest.from_json(self.version.manifest["extra"]["request"])
        if self.encoder.architecture == IMPORTED:
            raise QueryError(
                f"index {self.name!r} was imported without its encoder: it answers vectors and the "
                "files it holds, no other pictures"
            )
        vectors, spec = embed_bytes([data], request, self._settings)
        self._expect(spec)
        return vectors[0], None

    def _row_of_path(self, query: Query) -> int | None:
        """The row of an indexed path whose file is gone, which needs no reading."""
        if not isinstance(query, (str, bytes, os.PathLike)):
            return None
        path = os.path.abspath(os.path.expanduser(os.fsencode(query)))
        return None if os.path.exists(path) else self.version.key_of_path(path)

    def _mask(self, where: Where | None) -> NDArray[np.bool_] | None:
        if where is None:
            return None
        if not isinstance(where, str):
            mask = np.asarray(where)
            if mask.dtype != np.bool_ or mask.shape != (len(self),):
                raise QueryError(
                    f"where= is a mask of {mask.dtype} {mask.shape}; it takes one bool for each of "
                    f"the {len(self)} rows of to_pandas()"
                )
            return mask
        is_dataset = where in self.version.manifest["extra"]["datasets"]
        takes = _in_dataset if is_dataset else _matches
        mask = np.fromiter((takes(row, where) for row in self.version.iter_rows()), np.bool_)
        if not mask.any():
            raise QueryError(
                f"where={where!r} is no dataset of this index and matches no path; a pattern must "
                f"match a path to its end, such as '{where.rstrip('/*')}/*'"
            )
        return mask

    def _checked(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        if vectors.shape[-1] != self.dim:
            raise EncoderMismatchError(self.name, self.encoder.describe(), f"{vectors.shape[-1]}-d")
        return np.ascontiguousarray(vectors, np.float32)

    def _expect(self, spec: EncoderSpec) -> None:
        if spec.fingerprint != self.encoder.fingerprint:
            raise EncoderMismatchError(self.name, self.encoder.describe(), spec.describe())

    def _same_encoder(self, other: Index) -> None:
        if other.encoder.fingerprint != self.encoder.fingerprint:
            raise EncoderMismatchError(self.name, self.encoder.describe(), other.encoder.describe())


def _in_dataset(row: ItemRow, dataset: str) -> bool:
    return any(copy.dataset == dataset for copy in row.copies)


def _matches(row: ItemRow, pattern: str) -> bool:
    """Whether a pattern matches the whole path of a copy, or the end of it below a folder."""
    paths = [show_path(copy.path) for copy in row.copies]
    patterns = (pattern, f"*/{pattern}")
    return any(fnmatch.fnmatchcase(path, p) for path in paths for p in patterns)


def compare_indexes(a: Index, b: Index, k: int, data_dir: Path) -> dict[str, Any]:
    """See :func:`toolkit.compare`."""
    rows_b = {row.image_key: key for key, row in enumerate(b.version.iter_rows())}
    pairs = [
        (key, rows_b[row.image_key])
        for key, row in enumerate(a.version.iter_rows())
        if row.image_key in rows_b
    ]
    if not pairs:
        raise QueryError(f"{a.name!r} and {b.name!r} have no picture in common")
    keys_a, keys_b = np.array(pairs, np.int64).T
    return {
        "images": len(pairs),
        "neighbour_overlap": quality.neighbour_overlap(a.vectors[keys_a], b.vectors[keys_b], k),
        "label_precision": {i.name: i.label_precision() for i in (a, b)},
        "images_per_s": {i.name: last_rate(data_dir, i.encoder.describe()) for i in (a, b)},
    }


def published_names(data_dir: Path) -> tuple[str, ...]:
    """Names of every published index, sorted."""
    from urllib.parse import unquote  # deferred: errors and lists only

    folders = (data_dir / "indexes").glob("*/CURRENT")
    return tuple(sorted(unquote(f.parent.name, errors="surrogateescape") for f in folders))
