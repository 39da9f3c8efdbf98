"""A contact sheet: a picture of the query and what a search found, to look at anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import ImageError
from toolkit.images.decode import decode, read_file
from toolkit.records import show_path
from toolkit.text import one_line

if TYPE_CHECKING:
    from PIL import Image

    from toolkit.hits import Hits

#: Side of one cell in pixels, height of its caption, and cells in a row.
CELL_PX, CAPTION_PX, COLUMNS = 224, 34, 5

_MARGIN = 8

# Characters of a name that fit under a cell in Pillow's own font.
_NAME_CHARS = 36


def write_contact_sheet(query: str | Path, hits: Hits, path: Path) -> Path:
    """Write a PNG with the query first and the hits after it, nearest first.

    A file that cannot be read any more leaves its tile empty.

    Raises:
        OSError: If the PNG cannot be written.
    """
    from PIL import Image, ImageDraw  # deferred: only whoever draws needs Pillow

    cells = [(os.fsencode(query), "query")]
    cells += [(hit.file, f"{hit.rank}   {hit.score:.3f}") for hit in hits]
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
        name = _shortened(b"/".join(file.split(os.sep.encode())[-2:]))
        draw.text((x, y + CELL_PX + 2), f"{caption}\n{name}", fill="black")
        if place == 0:
            draw.rectangle((x - 3, y - 3, x + CELL_PX + 2, y + CELL_PX + 2), outline="red", width=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path


def _shortened(path: bytes) -> str:
    name = one_line(show_path(path))
    return name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…"


def _fitted(file: bytes) -> Image.Image:
    from PIL import Image  # deferred, as above

    try:
        picture = decode(read_file(file)[0]).rgb
    except ImageError:
        return Image.new("RGB", (CELL_PX, CELL_PX), "lightgrey")
    picture.thumbnail((CELL_PX, CELL_PX))
    return picture
