"""A 64-bit hash of a video's frames that changes little when the video is scaled or compressed again.

Each of four frames, evenly spaced over the duration, is scaled to 32 × 32 gray pixels, whatever its shape. Of its
discrete cosine transform, the 64 lowest frequencies without the mean are compared with their median, as in pHash
(Zauner 2010). Frame k of 4 contributes bits k, k + 4, k + 8, …: the hash of a still scene is that of its picture, and
that of moving frames depends on each of them.
"""

import numpy as np

SIDE = 32
BITS = 64
FRACTIONS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
"""Positions of the frames, as fractions of the duration."""
MIN_CONTRAST = 2.0
"""Standard deviation of the gray values, 0 to 255, below which a frame counts as a single color."""

_POSITIONS = np.arange(SIDE)
_DCT = np.cos(np.pi / SIDE * (_POSITIONS + 0.5) * _POSITIONS[:, None])
"""Of type II, up to the scale of its rows."""
_DCT /= np.linalg.norm(_DCT, axis=1, keepdims=True)
_LOWEST = sorted(((u, v) for u in range(SIDE) for v in range(SIDE)), key=lambda uv: (uv[0] + uv[1], uv[0]))[
    1 : BITS + 1
]
_ROWS, _COLUMNS = np.array(_LOWEST).T


def perceptual_hash(frames: np.ndarray) -> int | None:
    """Return the hash of gray frames [4, 32, 32], 0 to 255; None where all of them are of a single color."""
    frames = np.asarray(frames, dtype=np.float64)
    if frames.std(axis=(1, 2)).max() < MIN_CONTRAST:
        return None
    coefficients = (_DCT @ frames @ _DCT.T)[:, _ROWS, _COLUMNS]
    above = coefficients > np.median(coefficients, axis=1, keepdims=True)
    bits = above[np.arange(BITS) % len(frames), np.arange(BITS)]
    return int(np.packbits(bits).view(">u8")[0])
