"""A hundred free photos that travel with the package, for the demo and a first try.

Law: every photo is CC0 or in the public domain and has its block in ``CREDITS.txt``. They were
chosen to show what a search looks like; they are no benchmark.
"""

from __future__ import annotations

from pathlib import Path

#: One folder a class: animals, fishes, monuments, renewable, tools.
PHOTOS = Path(__file__).parent / "photos"

#: Photos that are here in two sizes, as (small, large) below :data:`PHOTOS`.
SAME_PHOTO_PAIRS = (
    ("monuments/categorization_brandenburgGate.webp", "monuments/brandenburgGate.webp"),
    ("monuments/categorization_colosseum.webp", "monuments/colosseum.webp"),
    ("monuments/greatPyramid.webp", "monuments/greatPyramidOfGiza.webp"),
)
