"""Overlapping windows that cover a whole video: one pass over the file, compared with decoding each window separately.

python -m benchmarks windows
"""

import tempfile
from pathlib import Path

import av
import numpy as np

from benchmarks.harness import Row, time_alternately
from tubelet.data import DataConfig
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.transforms import EvalTransform
from tubelet.data.windows import read_clips, sliding_windows

SECONDS, RATE, HEIGHT, WIDTH = 20, 25, 256, 340
OVERLAPS = (0, 8, 12)


def run(repeats: int = 3) -> list[Row]:
    """Windows of 16 frames, every 4th frame of the file, 112 × 112, of which consecutive ones share some frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "video.mp4")
        _write(path)
        return [_row(path, overlap, repeats) for overlap in OVERLAPS]


def _row(path: str, overlap: int, repeats: int) -> Row:
    options = DataConfig(datasets=[path], num_frames=16, sampling_rate=4, crop_size=112)
    numbers = sliding_windows(SECONDS * RATE, RATE, options, overlap)
    transform = EvalTransform(112)

    def ours() -> None:
        for _ in read_clips(open_video(path, "pyav"), numbers, path, transform):
            pass

    def peer() -> None:
        video = open_video(path, "pyav")
        for window in numbers:
            transform(read_frames(video, window, path))

    timing = time_alternately(ours, peer, repeats)
    name = f"windows, {len(numbers)} of {SECONDS} s of {WIDTH}x{HEIGHT}, {overlap} of 16 frames shared"
    return Row(name, f"{timing.ours:.2f} s", f"{timing.peer:.2f} s", timing.ratio)


def _write(path: str) -> None:
    """A moving pattern with a key frame every 250 frames, as encoders make by default."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": "250", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for t in range(SECONDS * RATE):
            wave = 127 + 100 * np.sin(np.stack([x / 19 + t / 13, y / 17 - t / 15, (x + y) / 21], -1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(wave.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
