"""Pictures and sound of scenes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tubelet.data.scenes.scene import DURATION, EVENT_DURATION, ONSETS, Scene
from tubelet.data.synthetic import cloud, shape_distance

RENDERER = "4"
"""Identifies the renderer in a data set's settings.json. Replace it in every change that alters the videos."""
SAMPLE_RATE = 16_000
"""Samples of the sound per second."""
COLORS = {"red": (225, 45, 45), "green": (40, 200, 60), "blue": (60, 90, 240), "yellow": (235, 215, 40)}
TONES = {"flash": 880.0, "blink": 440.0, "swell": 660.0}
"""Frequency of each event's tone, in hertz."""

_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_ZOOM = {"stays still": 0.0, "zooms in": np.log(1.9), "zooms out": -np.log(1.9)}
_DRIFT = 0.36  # of the width of the picture
_NOISE = 3.0  # gray levels of 255
_SWELL = 1.6
_LOUDNESS = 0.3

Frames = npt.NDArray[np.uint8]
Sound = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sprite:
    """A shape on a straight path. Lengths are in widths of the picture, from its upper left corner."""

    color: str
    shape: str
    radius: float
    middle: tuple[float, float]
    """Position (x, y) at half of the duration."""
    direction: str
    events: tuple[tuple[float, str], ...] = ()
    """Onset and name of each event."""


@dataclass(frozen=True)
class Tone:
    """A tone in the sound: onset in seconds, frequency in hertz, and position from 0 (left) to 1 (right)."""

    onset: float
    frequency: float
    position: float


def place(rng: np.random.Generator, scene: Scene) -> tuple[list[Sprite], list[Tone]]:
    """Draw what the attributes of a scene leave open: times, places and sizes."""
    onsets = [float(rng.uniform(*between)) for between in ONSETS]
    events = tuple(zip(onsets, (scene.first, scene.second), strict=True))
    radius = float(rng.uniform(0.12, 0.15))
    cells = np.array([(x, y) for x in (0.31, 0.69) for y in (0.31, 0.69)])[rng.permutation(4)[: scene.number]]
    middles = cells + rng.uniform(-0.03, 0.03, cells.shape)
    sprites = [
        Sprite(scene.color, scene.shape, radius, (float(x), float(y)), scene.direction, events) for x, y in middles
    ]
    drift = _DRIFT * _DIRECTIONS[scene.direction][0]
    center = float(middles[:, 0].mean())
    tones = [Tone(onset, TONES[name], center + drift * (onset / DURATION - 0.5)) for onset, name in events]
    return sprites, tones


def render_frames(
    rng: np.random.Generator, sprites: Sequence[Sprite], camera: str, num_frames: int, size: int
) -> Frames:
    """Render the pictures [T, H, W, 3] with noise that is drawn from `rng`."""
    background = _background(size)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    frames = np.empty((num_frames, size, size, 3), np.float32)
    for frame, seconds in zip(frames, (np.arange(num_frames) + 0.5) * (DURATION / num_frames), strict=True):
        scale = float(np.exp(_ZOOM[camera] * (seconds / DURATION - 0.5)))
        position = 0.5 + (axis - 0.5) / scale  # of each row and column in the scene
        frame[:] = _sample(background, position)
        for sprite in sprites:
            _paint(frame, sprite, seconds, position, pixel=1 / (size * scale))
    frames += rng.normal(0, _NOISE, frames.shape)
    return (frames + 0.5).clip(0, 255).astype(np.uint8)


def render_sound(rng: np.random.Generator, tones: Sequence[Tone]) -> Sound:
    """Render the stereo sound [2, samples], from -1 to 1, of tones with a soft attack over quiet noise."""
    sound = rng.normal(0, 0.01, (2, round(DURATION * SAMPLE_RATE))).astype(np.float32)
    time = np.arange(round(EVENT_DURATION * SAMPLE_RATE)) / SAMPLE_RATE
    envelope = np.minimum(1, time / 0.01) * np.exp(-time / 0.15)
    for tone in tones:
        wave = _LOUDNESS * envelope * np.sin(2 * np.pi * tone.frequency * time)
        angle = np.clip(tone.position, 0, 1) * np.pi / 2  # equal power in all positions
        start = round(tone.onset * SAMPLE_RATE)
        part = sound[:, start : start + len(wave)]
        part += np.stack([np.cos(angle) * wave, np.sin(angle) * wave])[:, : part.shape[1]].astype(np.float32)
    return sound


@functools.cache
def _background(size: int) -> np.ndarray:
    """Return a dim periodic texture [2·size, 2·size, 3], of which a picture shows a part.

    It is the same in all scenes. Otherwise it would be the easiest way to tell scenes apart, and pretraining without
    labels would describe it instead of the sprites.
    """
    rng = np.random.default_rng(0)
    texture = np.stack([cloud(rng, 2 * size) for _ in range(3)], axis=-1)
    gray = texture.mean(axis=-1, keepdims=True)
    return 35 + 50 * (0.7 * gray + 0.3 * texture)


def _sample(background: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Interpolate the background bilinearly where rows and columns have these positions, [H, W, 3]."""
    side = len(background)
    where = position * (side / 2)
    low = np.floor(where).astype(int)
    fraction = (where - low).astype(np.float32)
    low, high = low % side, (low + 1) % side
    rows = background[low] + fraction[:, None, None] * (background[high] - background[low])
    return rows[:, low] + fraction[:, None] * (rows[:, high] - rows[:, low])


def _paint(frame: np.ndarray, sprite: Sprite, seconds: float, position: np.ndarray, pixel: float) -> None:
    """Paint a sprite at a time. position: of each row and column in the scene; pixel: its size there."""
    color, radius = np.array(COLORS[sprite.color], np.float32), sprite.radius
    for onset, event in sprite.events:
        if onset <= seconds < onset + EVENT_DURATION:
            if event == "blink":
                return
            if event == "flash":
                color = np.full(3, 255, np.float32)
            if event == "swell":
                radius *= _SWELL
    travelled = _DRIFT * (seconds / DURATION - 0.5)
    x, y = (m + travelled * d for m, d in zip(sprite.middle, _DIRECTIONS[sprite.direction], strict=True))
    distance = shape_distance(sprite.shape, (position[None] - x) / radius, (position[:, None] - y) / radius)
    cover = np.clip(0.5 - distance * (radius / pixel), 0, 1)[..., None]
    frame += cover * (color - frame)
