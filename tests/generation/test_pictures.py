import io

import numpy as np
import torch
from PIL import Image

from tubelet.generation import pictures


def shades(*values, size=64):
    """Gray frames [1, T, H, W, 3], one for each value."""
    return np.full((1, len(values), size, size, 3), 0, np.uint8) + np.array(values, np.uint8)[:, None, None, None]


def test_pixels_are_rounded_and_gray_frames_become_rgb():
    frames = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 5, 1, 1)
    assert pictures.to_pixels(frames)[0, :, 0, 0].tolist() == [[v] * 3 for v in (0, 0, 128, 255, 255)]
    colours = torch.rand(2, 3, 4, 5, 6)
    assert np.array_equal(pictures.to_pixels(colours)[1, 2, 3, 4], (colours[1, :, 2, 3, 4] * 255).round().numpy())


def test_filmstrip_layout():
    seen, ahead = shades(10, 20, 30), {"truth": shades(40, 50, 60, 70), "prediction": shades(80, 90, 100, 110)}
    strip = np.asarray(pictures.filmstrip(seen, ahead))
    for row, values in enumerate(((10, 20, 30), (40, 50, 60, 70), (80, 90, 100, 110))):
        for column, value in enumerate(values):
            assert (strip[row * 68 + 32, 100 + column * 68 + 32, :3] == value).all()
    many = np.asarray(pictures.filmstrip(seen, {"truth": shades(*range(100, 125))}))
    shown = [int(many[68 + 32, 100 + column * 68 + 32, 0]) for column in range(9)]
    assert shown == list(range(100, 125, 3))


def test_animation_shows_input_frames_then_one_column_per_title():
    seen, ahead = shades(10, 200), {"truth": shades(40, 90, 160), "prediction": shades(250, 120, 60)}
    animation = Image.open(io.BytesIO(pictures.animation(seen, ahead, frames_per_second=5)))
    expected = [(10, 10), (200, 200), (40, 250), (90, 120), (160, 60)]
    assert animation.n_frames == 5
    for number, (left, right) in enumerate(expected):
        animation.seek(number)
        assert animation.info["duration"] == 200
        sheet = np.asarray(animation.convert("RGB")).astype(int)
        assert sheet.shape == (16 + 128 + 8, 2 * (128 + 8), 3)
        for x, value in ((68, left), (136 + 68, right)):
            assert np.abs(sheet[16 + 68, x] - value).max() <= 3  # a GIF has only 256 colors
