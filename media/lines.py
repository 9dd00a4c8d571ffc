"""Drawing lines with exact positions.

PIL rounds the ends of a line to whole pixels. A line that moves by a fiftieth of a pixel would then jump now
and then, and G's pictures would tremble.
"""
import numpy as np


def draw_lines(image, lines, width):
    """Draw lines in place: image float32 (H, W, 3), width in pixels, lines [(points (n, 2), closed, colour)].

    Each pixel is mixed with the colour by the share of it that the line covers, which is computed from its
    distance to the nearest segment. The ends and joints of a line are round. closed: join the ends, too.
    """
    # the segments of all lines, because one call of NumPy for all is faster than one for each
    starts = np.concatenate([p if closed else p[:-1] for p, closed, _ in lines]).astype(np.float32)
    ends = np.concatenate([part for p, closed, _ in lines for part in (p[1:], p[:closed])]).astype(np.float32)
    line = np.repeat(np.arange(len(lines)), [len(p) - 1 + closed for p, closed, _ in lines])

    # a box of pixels around each of the n segments
    size, reach = image.shape[1::-1], width / 2 + 1
    first = np.floor(np.minimum(starts, ends) - reach).clip(0, size).astype(np.float32)     # (n, 2): x, y
    last = np.ceil(np.maximum(starts, ends) + reach).clip(0, size)                          # (n, 2)
    box = np.arange((last - first).max(), dtype=np.float32)                                 # (k,)
    x, y = first[:, 0, None, None] + box, first[:, 1, None, None] + box[:, None]        # (n, 1, k), (n, k, 1)

    # the share of each pixel that is covered
    dx, dy = x - starts[:, 0, None, None], y - starts[:, 1, None, None]                 # (n, 1, k), (n, k, 1)
    ux, uy = (ends - starts).T[..., None, None]                                         # (n, 1, 1) each
    along = ((dx * ux + dy * uy) / np.maximum(ux ** 2 + uy ** 2, 1e-6)).clip(0, 1)      # (n, k, k)
    distance = np.sqrt((dx - along * ux) ** 2 + (dy - along * uy) ** 2)                 # (n, k, k)
    share = np.minimum(distance + width / 2, 0.5) - np.maximum(distance - width / 2, -0.5)
    segment, row, column = np.nonzero((share > 0) & (x < size[0]) & (y < size[1]))
    share, line = share[segment, row, column], line[segment]
    row, column = row + first[segment, 1].astype(int), column + first[segment, 0].astype(int)

    # where segments of a line overlap, the larger share counts; later lines lie over earlier ones
    most = np.zeros(image.shape[:2], np.float32)
    for k, (_, _, colour) in enumerate(lines):
        own = line == k
        at = row[own], column[own]
        most[at] = 0
        np.maximum.at(most, at, share[own])
        image[at] += most[at][:, None] * (np.float32(colour) - image[at])
