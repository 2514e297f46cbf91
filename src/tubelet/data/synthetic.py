"""Small moving scenes in noise: sprites on a cloudy background, all moved by the same global motion.

A clip is a moving window onto a periodic ("torus") canvas, which is painted once per clip: a smooth cloud in each color
channel, and about fifty sprites of one shape in random sizes, orientations and colors, some darker and some brighter
than the background. Each frame samples the canvas through an affine map with bilinear interpolation, so motion has
subpixel accuracy. Coarse noise, independent in every frame, is added: it cannot be predicted, so a predictive objective
learns to ignore it.

Two independent labels:
  motion      how the window moves: eight motions in four opposite pairs. A clip played backwards shows the opposite
              motion, so neither a single frame nor absolute frame differences can tell the two apart;
  appearance  the shape of the sprites.
Everything else is random and independent of the labels: colors, background, number, size and position of the sprites,
zoom, speed, center and noise.
"""

import numpy as np
import numpy.typing as npt

MOTIONS = ("pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out", "turn left", "turn right")
APPEARANCES = ("disc", "ring", "square", "triangle", "plus", "star", "bar", "dots")

RENDERER = "03ed3bdf7855b7ef"
"""Identifies the renderer in a data set's settings.json. Replace it in every change that alters the rendered clips."""

NOISE = 60.0
"""Standard deviation of the noise, in gray levels of 255; sprites and background differ by about 100."""
NOISE_GRAIN = 2
"""Side of the squares of equal noise in pixels; finer noise would be lost in video compression and resizing."""

Array = npt.NDArray[np.floating]


def cloud(rng: np.random.Generator, side: int, waves: int = 6) -> Array:
    """A smooth periodic field in [0, 1], [side, side]: a sum of a few random plane waves."""
    grid = np.arange(side, dtype=np.float32) * (2 * np.pi / side)
    fx, fy = rng.integers(-5, 6, (2, waves))
    phase = rng.uniform(0, 2 * np.pi, waves)
    amplitude = rng.uniform(0.3, 1.0, waves) / waves**0.5
    x = np.exp(1j * fx[:, None] * grid[None])
    y = amplitude[:, None] * np.exp(1j * (fy[:, None] * grid[None] + phase[:, None]))
    field = np.einsum("ky,kx->yx", y, x).real
    return (0.5 + 0.5 * np.tanh(field)).astype(np.float32)


def shape_distance(name: str, u: Array, v: Array) -> Array:
    """Signed distance (in radii, negative inside, approximate) of a unit sprite at coordinates u (right), v (down)."""
    if name == "disc":
        return np.hypot(u, v) - 0.85
    if name == "ring":
        return np.abs(np.hypot(u, v) - 0.75) - 0.25
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.75
    if name == "triangle":
        return np.maximum(-v, 0.866 * np.abs(u) + 0.5 * v) - 0.55
    if name in ("plus", "cross"):
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1.0, b - 0.3), np.maximum(b - 1.0, a - 0.3))
    if name == "star":
        return np.hypot(u, v) - (0.68 + 0.32 * np.cos(5 * np.arctan2(v, u)))
    if name == "bar":
        return np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.35)
    if name == "dots":
        return np.hypot(np.abs(u) - 0.55, np.abs(v) - 0.55) - 0.36
    raise ValueError(f"unknown shape {name}")


def _canvas(rng: np.random.Generator, appearance: int, side: int, unit: float) -> Array:
    """Paint background and sprites: [side, side, 3] from 0 to 255, periodic in both directions."""
    background = np.stack([cloud(rng, side) for _ in range(3)], axis=-1)
    canvas = 128 + 90 * (background - background.mean(axis=(0, 1)))
    number = int(rng.integers(36, 65))
    # Positions on a jittered grid, so that no part of the canvas is empty.
    cells = int(np.ceil(number**0.5))
    for cell in rng.permutation(cells * cells)[:number]:
        center = (np.array(divmod(int(cell), cells)) + rng.uniform(0.1, 0.9, 2)) * (side / cells)
        radius = float(unit * rng.uniform(0.7, 1.3))
        reach = int(np.ceil(radius * 1.45 + 1))
        corner = np.floor(center).astype(int) - reach
        y = (corner[0] + np.arange(2 * reach + 1) - center[0]).astype(np.float32)[:, None] / radius
        x = (corner[1] + np.arange(2 * reach + 1) - center[1]).astype(np.float32)[None, :] / radius
        angle = rng.uniform(0, 2 * np.pi)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        cover = np.clip(0.5 - shape_distance(APPEARANCES[appearance], c * x + s * y, c * y - s * x) * radius, 0, 1)[
            ..., None
        ]
        color = np.where(rng.random(3) < 0.5, rng.uniform(0, 60, 3), rng.uniform(195, 255, 3)).astype(np.float32)
        rows = (corner[0] + np.arange(2 * reach + 1)) % side
        columns = (corner[1] + np.arange(2 * reach + 1)) % side
        spot = np.ix_(rows, columns)
        canvas[spot] += cover * (color - canvas[spot])
    return canvas


def _maps(rng: np.random.Generator, motion: int, num_frames: int, size: int) -> tuple[Array, Array]:
    """For each frame the linear part [T, 2, 2] and the shift [T, 2] of the map from pixels (y, x) to the canvas."""
    time = np.linspace(-0.5, 0.5, num_frames)  # the middle frame has the same distribution for all motions
    name = MOTIONS[motion]
    travel = rng.uniform(0.2, 0.45) * size
    growth = np.log(rng.uniform(1.4, 2.0))
    turn = np.deg2rad(rng.uniform(30, 75))
    center = size * rng.uniform(0.25, 0.75, 2)  # of zoom and turn
    scale, angle = np.ones(num_frames), np.zeros(num_frames)
    drift = np.zeros((num_frames, 2))
    if name.startswith("pan"):
        direction = {"left": (0, 1), "right": (0, -1), "up": (1, 0), "down": (-1, 0)}[name.split()[1]]
        drift = time[:, None] * travel * np.array(direction)
    elif name.startswith("zoom"):
        scale = np.exp(time * growth * (-1 if name.endswith("in") else 1))
    else:
        angle = time * turn * (-1 if name.endswith("left") else 1)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    linear = linear / rng.uniform(0.9, 1.1)  # zoom of the whole clip
    shift = drift + rng.uniform(0, 4 * size, 2) - np.einsum("tij,j->ti", linear, center)
    return linear.astype(np.float32), shift.astype(np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> Array:
    """Noise that is independent for each frame, grain and color channel, [T, H, W, 3]."""
    frames, height, width, channels = shape
    grains = (frames, -(-height // NOISE_GRAIN), -(-width // NOISE_GRAIN), channels)
    noise = NOISE * rng.standard_normal(grains, dtype=np.float32)
    return noise.repeat(NOISE_GRAIN, axis=1).repeat(NOISE_GRAIN, axis=2)[:, :height, :width]


def render_clip(
    rng: np.random.Generator, motion: int, appearance: int, num_frames: int = 16, size: int = 64
) -> npt.NDArray[np.uint8]:
    """Render one clip. Everything but the two labels is drawn from `rng`.

    Args:
        rng: Source of the draws.
        motion: Index of `MOTIONS`.
        appearance: Index of `APPEARANCES`.
        num_frames: T.
        size: H and W in pixels.

    Returns:
        uint8 [T, H, W, 3].
    """
    side = 2 * size
    canvas = _canvas(rng, appearance, side, unit=size * 0.09).reshape(side * side, 3)
    linear, shift = _maps(rng, motion, num_frames, size)
    axis = np.arange(size, dtype=np.float32)
    positions = [
        linear[:, i, 0, None, None] * axis[:, None] + linear[:, i, 1, None, None] * axis + shift[:, i, None, None]
        for i in (0, 1)
    ]
    low = [np.floor(w).astype(np.int32) for w in positions]
    fy, fx = ((w - start)[..., None] for w, start in zip(positions, low, strict=True))
    y0, x0 = (start % side for start in low)
    y1, x1 = ((start + 1) % side for start in low)
    top = _mix(canvas, y0 * side + x0, y0 * side + x1, fx)
    bottom = _mix(canvas, y1 * side + x0, y1 * side + x1, fx)
    bottom -= top
    bottom *= fy
    top += bottom
    top += _noise(rng, top.shape)
    top += 0.5
    return np.clip(top, 0, 255, out=top).astype(np.uint8)


def _mix(canvas: Array, left: npt.NDArray[np.int32], right: npt.NDArray[np.int32], fraction: np.ndarray) -> np.ndarray:
    """Interpolate the colors [..., 3] of pixels `left` and `right`, with `fraction` [..., 1] of the right one."""
    mixed = canvas.take(left, axis=0) * (1 - fraction)
    mixed += canvas.take(right, axis=0) * fraction
    return mixed
