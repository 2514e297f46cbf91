"""Damaged videos, each a function of its number, and what decoders make of them in a process of their own."""

import functools
import json
import sys
import time
from pathlib import Path

import numpy as np

from tubelet.data import VideoError
from tubelet.data.decoders import open_video, read_frames

CLOSE = 6.0
"""Mean difference of two frames that count as equal; neighbors in the generated videos differ by more."""


def mutate(content: bytes, number: int) -> bytes:
    """Truncate a file, flip or zero bytes, or swap or repeat parts of it."""
    rng = np.random.default_rng(number)
    data, size = bytearray(content), len(content)
    kind = number % 6
    if kind == 0:
        return bytes(data[: int(rng.integers(1, size))])
    if kind == 1:
        for position in rng.integers(size, size=int(rng.integers(1, 20))).tolist():
            data[position] ^= 1 << int(rng.integers(8))
    elif kind == 2:  # in the tables, which are at an end of most files
        ends = np.concatenate([np.arange(min(2000, size)), np.arange(max(0, size - 2000), size)])
        for position in rng.choice(ends, 3).tolist():
            data[position] = int(rng.integers(256))
    else:
        length = int(rng.integers(1, max(2, size // 10)))
        first, second = (int(start) for start in rng.integers(max(1, size - length), size=2))
        one, two = data[first : first + length], data[second : second + length]
        if kind == 3:
            data[first : first + length] = bytes(length)
        elif kind == 4 and abs(first - second) >= length:
            data[first : first + length], data[second : second + length] = two, one
        else:
            data[second:second] = one
    return bytes(data)


def decoded(path: str) -> tuple[list[np.ndarray], bool]:
    """The frames up to the first error, straight through the file, and whether there is none."""
    import av

    frames: list[np.ndarray] = []
    intact = True
    try:
        with av.open(path) as container:
            stream = container.streams.best("video")
            size = None
            for frame in container.decode(stream):
                size = size or (frame.width, frame.height)
                frames.append(frame.to_ndarray(format="rgb24", width=size[0], height=size[1]))
                intact = intact and not frame.is_corrupt
    except Exception:  # any damage; the frames before are what counts
        intact = False
    return frames, intact and len(frames) > 0


def thin(frames: np.ndarray) -> np.ndarray:
    """Every fourth pixel of frames [n, H, W, 3]."""
    return frames[:, ::4, ::4].astype(np.int16)


@functools.lru_cache
def intact_frames(path: str) -> np.ndarray:
    return np.stack(decoded(path)[0])


def distances(frames: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean absolute differences, [n, m]; infinite where sizes differ."""
    if frames.shape[1:] != others.shape[1:]:
        return np.full((len(frames), len(others)), np.inf)
    return np.stack([np.abs(thin(others) - frame).mean((1, 2, 3)) for frame in thin(frames)])


def judge(path: str, original: str, decoder: str) -> str:
    """Read a clip; "" where it is right, "refused: …" or "damaged" where that is allowed, else what is wrong.

    Where decoding straight through the file gives no error and only frames of the intact file in their order, so must
    the clip.
    Otherwise its codec conceals damage, and how depends on the frames decoded before: then only the size counts.
    """
    try:
        video = open_video(path, decoder)
        count = video.num_frames
        indices = np.unique(np.linspace(0, min(count, 40) - 1, 8).astype(int))
        times = video.times
        frames = read_frames(video, indices, path)
    except VideoError as error:
        return f"refused: {error.reason[:80]}"
    if len(times) != count or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        return "WRONG times"
    if not video.fps > 0 or not np.isfinite(video.fps):
        return f"WRONG rate {video.fps}"
    intact, (straight, is_intact) = intact_frames(original), decoded(path)
    nearest = distances(np.stack(straight), intact) if is_intact else np.full((1, 1), np.inf)
    if (nearest.min(1) > CLOSE).any() or (np.diff(nearest.argmin(1)) <= 0).any():
        # The header of a mutated file may have another size, but all frames have it.
        same = not straight or frames.shape[1:] == straight[0].shape
        return "damaged" if same else f"WRONG size {frames.shape}"
    nearest = distances(frames, intact)
    if (nearest.min(1) > CLOSE).any():
        return f"WRONG frames {indices[nearest.min(1) > CLOSE].tolist()}: {nearest.min(1).max():.0f}"
    if (np.diff(nearest.argmin(1)) < 0).any():
        return f"WRONG order {nearest.argmin(1).tolist()}"
    return ""


if __name__ == "__main__":
    # arguments: decoder, folder of the originals, folder for the mutated files, numbers
    decoder, originals, folder = sys.argv[1:4]
    names = sorted(path.name for path in Path(originals).iterdir())
    for number in map(int, sys.argv[4:]):
        original = Path(originals) / names[number // 6 % len(names)]
        path = Path(folder) / f"{number}{original.suffix}"
        path.write_bytes(mutate(original.read_bytes(), number))
        print(json.dumps([number, original.name, None, 0]), flush=True)
        began = time.monotonic()
        outcome = judge(str(path), str(original), decoder)
        print(json.dumps([number, original.name, outcome, time.monotonic() - began]), flush=True)
        path.unlink()
