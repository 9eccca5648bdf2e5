"""Fills a gap with a dissolve: the frame to beat, and what shows anchors in motion without any model.

The shares are of sRGB values, not of linear light: sRGB steps are about even to the eye, so the dissolve is
seen for as long as it takes. In linear light the brighter anchor is nearly all that is seen from half-way on.
"""

import numpy as np
from PIL import Image

from infer.film.gap import Gap


def blend_gap(gap: Gap, frame_interval: int) -> list[Image.Image]:
    """frame_interval frames, the share of the last anchor growing by equal steps."""
    first, last = (np.asarray(anchor, np.float32) for anchor in (gap.first, gap.last))
    shares = np.arange(1, frame_interval + 1) / (frame_interval + 1)
    return [Image.fromarray(np.rint(first + share * (last - first)).astype(np.uint8)) for share in shares]
