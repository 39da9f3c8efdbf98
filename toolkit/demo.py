"""The demo: the sample photos, real weights, no network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from toolkit import api, config
from toolkit.contact_sheet import write_contact_sheet
from toolkit.errors import DatasetError
from toolkit.hits import Hits
from toolkit.samples import PHOTOS

#: Name of the demo's index, and the model whose weights come with the extra ``demo``.
INDEX, MODEL = "demo", "tf_efficientnet_lite0"


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """What the demo shows: the photo asked for, its neighbours, and a picture of both."""

    query: Path
    hits: Hits
    sheet: Path


def run(photo: str) -> Shown:
    """Build the index of the sample photos and search for one of them.

    Raises:
        DatasetError: If there is no such sample.
        WeightsNotFoundError: If the extra ``demo`` is not installed.
    """
    query = PHOTOS / photo
    if not query.is_file():
        raise DatasetError(f"no sample {photo!r}; the samples lie in {PHOTOS}")
    build = api.build_index(PHOTOS, name=INDEX, model=MODEL, distributed=False)
    hits = build.index.search(query, k=9)
    sheet = config.resolve().data_dir / "demo.png"
    return Shown(query, hits, write_contact_sheet(query, hits, sheet))
