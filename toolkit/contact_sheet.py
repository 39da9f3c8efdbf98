"""A contact sheet: a picture of the query and what a search found, to look at anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.images.decode import decode, read_file

if TYPE_CHECKING:
    from PIL import Image

    from toolkit.hits import Hits

#: Side of one cell in pixels, height of its caption, and cells in a row.
CELL_PX, CAPTION_PX, COLUMNS = 224, 34, 5

_MARGIN = 8

# Characters of a name that fit under a cell in Pillow's own font.
_NAME_CHARS = 36


def write_contact_sheet(query: str, hits: Hits, path: Path) -> Path:
    """Write a PNG with the query first and the hits after it, nearest first.

    Raises:
        ImageError: If one of the files cannot be read any more.
        OSError: If the PNG cannot be written.
    """
    from PIL import Image, ImageDraw  # deferred: only whoever draws needs Pillow

    cells = [(query, "query"), *((hit.path, f"{hit.rank}   {hit.score:.3f}") for hit in hits)]
    n_rows = -(-len(cells) // COLUMNS)
    width, height = CELL_PX + _MARGIN, CELL_PX + CAPTION_PX + _MARGIN
    sheet = Image.new("RGB", (width * COLUMNS + _MARGIN, height * n_rows + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (file, caption) in enumerate(cells):
        x = _MARGIN + place % COLUMNS * width
        y = _MARGIN + place // COLUMNS * height
        picture = _fitted(file)
        sheet.paste(
            picture, (x + (CELL_PX - picture.width) // 2, y + (CELL_PX - picture.height) // 2)
        )
        name = _shortened(f"{os.path.basename(os.path.dirname(file))}/{os.path.basename(file)}")
        draw.text((x, y + CELL_PX + 2), f"{caption}\n{name}", fill="black")
        if place == 0:
            draw.rectangle((x - 3, y - 3, x + CELL_PX + 2, y + CELL_PX + 2), outline="red", width=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…"


def _fitted(file: str) -> Image.Image:
    picture = decode(read_file(os.fsencode(file))[0]).rgb
    picture.thumbnail((CELL_PX, CELL_PX))
    return picture
