"""The loops of a resize, compiled by numba; importing this compiles them, or loads them.

The sums are Pillow's: 8-bit pixels, coefficients of :data:`BITS` fractional bits, rounded to
8 bits after each direction.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

#: Fractional bits of a coefficient: with 8 of a pixel and 2 of overshoot they fill 32.
BITS = 32 - 8 - 2

_HALF = 1 << (BITS - 1)

# Rows that are summed side by side. Pixels of one row lie apart from those of another there,
# so that the innermost loop runs over neighbours in memory and becomes vector instructions.
_ROWS = 64

_SIGNATURE = types.void(
    types.Array(types.uint8, 3, "C", readonly=True),
    types.int32[::1],
    types.int32[::1],
    types.int32[:, ::1],
    types.uint8[:, :, ::1],
)


@njit([_SIGNATURE], nogil=True, cache=True, error_model="numpy")
def across(
    pixels: NDArray[np.uint8],
    first: NDArray[np.int32],
    n_taps: NDArray[np.int32],
    taps: NDArray[np.int32],
    out: NDArray[np.uint8],
) -> None:
    """Resize along the rows.

    Args:
        pixels: Shape ``(h, w, 3)``.
        first: Of each new column, the first old one that counts.
        n_taps: How many count.
        taps: Their coefficients, shape ``(n, most)``.
        out: Shape ``(h, n, 3)``, written to.
    """
    left = first[0]
    width = first[-1] + n_taps[-1] - left
    columns = np.empty((width, 3 * _ROWS), np.uint8)
    sums = np.empty(3 * _ROWS, np.int32)
    for top in range(0, len(pixels), _ROWS):
        n_rows = min(_ROWS, len(pixels) - top)
        for x in range(width):
            column = columns[x]
            for row in range(n_rows):
                for channel in range(3):
                    column[channel * _ROWS + row] = pixels[top + row, left + x, channel]
        for x in range(len(first)):
            sums[:] = _HALF
            start = first[x] - left
            for tap in range(n_taps[x]):
                weight, column = taps[x, tap], columns[start + tap]
                for i in range(3 * _ROWS):
                    sums[i] += np.int32(column[i]) * weight
            for row in range(n_rows):
                for channel in range(3):
                    value = sums[channel * _ROWS + row] >> BITS
                    out[top + row, x, channel] = min(max(value, 0), 255)


@njit([_SIGNATURE], nogil=True, cache=True, error_model="numpy")
def down(
    pixels: NDArray[np.uint8],
    first: NDArray[np.int32],
    n_taps: NDArray[np.int32],
    taps: NDArray[np.int32],
    out: NDArray[np.uint8],
) -> None:
    """Resize along the columns; as :func:`across`, to shape ``(n, w, 3)``."""
    width = 3 * pixels.shape[1]
    rows = pixels.reshape(len(pixels), width)
    lines = out.reshape(len(out), width)
    sums = np.empty(width, np.int32)
    for y in range(len(first)):
        sums[:] = _HALF
        for tap in range(n_taps[y]):
            weight, row = taps[y, tap], rows[first[y] + tap]
            for i in range(width):
                sums[i] += np.int32(row[i]) * weight
        line = lines[y]
        for i in range(width):
            line[i] = min(max(sums[i] >> BITS, 0), 255)
