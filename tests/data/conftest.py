"""Small generated videos, in which each frame shows its number as brightness."""

import os
from pathlib import Path

import av
import numpy as np
import pytest


def write_video(path, *, frames=30, height=96, width=128, rate=30, codec="libx264", pix_fmt="yuv420p", options=None):
    """A smooth moving pattern whose upper left corner has the brightness 4 x frame number + 3."""
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        for number in range(frames):
            wave = 127 + 100 * np.sin(np.stack([x / 9 + number / 3, y / 7 - number / 5, (x + y) / 11], -1))
            wave[: height // 3, : width // 3] = 4 * number + 3  # decoded colors may be up to 3 darker
            container.mux(stream.encode(av.VideoFrame.from_ndarray(wave.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def frame_numbers(frames):
    """The numbers that frames [T, H, W, 3] of `write_video` show."""
    height, width = frames.shape[1:3]
    return (frames[:, 4 : height // 3 - 4, 4 : width // 3 - 4].mean((1, 2, 3)) / 4).astype(int)


@pytest.fixture(scope="session")
def make_video():
    return write_video


@pytest.fixture(scope="session")
def numbers_of():
    return frame_numbers


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A folder of six videos of different lengths and sizes, two of them in a subfolder with a space."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "two more").mkdir()
    for number, name in enumerate(("a", "b", "c", "d", "two more/e", "two more/f")):
        write_video(folder / f"{name}.mp4", frames=20 + 7 * number, height=64 + 16 * (number % 2), width=80)
    return folder


@pytest.fixture(scope="session")
def broken_video(videos, tmp_path_factory):
    """An h264 file with an intact index and damaged frames."""
    content = bytearray((videos / "b.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 6000] = bytes(6000)
    path = tmp_path_factory.mktemp("broken") / "broken.mp4"
    path.write_bytes(content)
    return str(path)


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real files outside the repository, which may not exist."""
    default = Path(__file__).parents[3] / "shared"
    return Path(os.environ.get("TUBELET_SHARED_DATA", default)) / "data"
