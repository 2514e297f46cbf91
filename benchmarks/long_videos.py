"""Random clips of files of ten seconds to one hour: time, and bytes read, with each decoder in turn.

A clip is 16 of 64 frames at a random place of an h264 file, 340x256, with a key frame every 250 frames at most. The
file is opened for each clip. `indexed` is the same with the index of the file in memory, as it is for the second clip
of a file in a worker. The time is that of the processor: the elapsed time where nothing else runs, since the decoders
use one thread and the files are in the page cache.

    python -m benchmarks long_videos
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.harness import Row
from benchmarks.loader import FRAME_STEP, NUM_FRAMES, write_video
from tubelet.config import ConfigError
from tubelet.data import Decoder
from tubelet.data.decoders import Video, check_decoder
from tubelet.data.decoders.decord2 import DecordVideo
from tubelet.data.decoders.frame_index import INDICES
from tubelet.data.decoders.pyav import PyavVideo
from tubelet.data.decoders.torchcodec import TorchcodecVideo

FPS, PART_SECONDS = 30, 10
LENGTHS = {"10 s": 1, "10 min": 60, "60 min": 360}
GOAL_SLOWDOWN = 1.2

Read = Callable[[str, int], object]
"""Reads the clip of a file that starts at a frame."""


def run(repeats: int = 9) -> list[Row]:
    """Compare the decoders on files of each length; the last row compares the longest with the shortest file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers of a loader
    try:
        return _run(repeats)
    finally:
        torch.set_num_threads(threads)


def _run(repeats: int) -> list[Row]:
    readers = dict(_readers())
    measured: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        part = write_video(Path(folder) / "part.mp4", seed=0, num_frames=FPS * PART_SECONDS)
        files = {length: repeated(part, Path(folder) / f"{n}.mp4", n) for length, n in LENGTHS.items()}
        rng = np.random.default_rng(0)
        for repeat in range(repeats + 1):
            place = rng.random()
            offset = int(rng.integers(FPS * PART_SECONDS - NUM_FRAMES * FRAME_STEP))
            for length, number in LENGTHS.items():
                # The same place in a part, so that equally many frames are decoded in files of all lengths.
                start = int(place * number) * FPS * PART_SECONDS + offset
                for name, read in readers.items():
                    before = bytes_read()
                    began = time.process_time()
                    read(files[length], start)
                    duration = time.process_time() - began
                    if repeat:  # the first one imports libraries
                        measured.setdefault((length, name), []).append((duration, bytes_read() - before))
    rows = []
    for length in LENGTHS:
        ours = measured[length, "pyav"]
        rows += [
            Row(
                f"clip of a file of {length}, against {name}",
                _result(ours),
                _result(measured[length, name]),
                statistics.median(peer[0] / our[0] for our, peer in zip(ours, measured[length, name], strict=True)),
            )
            for name in readers
            if name != "pyav"
        ]
    for name in ("pyav", "pyav, indexed"):
        longest, shortest = measured["60 min", name], measured["10 s", name]
        ratio = statistics.median(short[0] / long[0] for long, short in zip(longest, shortest, strict=True))
        rows.append(Row(f"60 min against 10 s, {name}", _result(longest), _result(shortest), ratio, 1 / GOAL_SLOWDOWN))
    return rows


def _readers() -> Iterator[tuple[str, Read]]:
    """Yield name and function of each decoder that works on this machine."""
    yield "pyav", lambda path, start: clip(uncached(path), start)
    yield "pyav, indexed", lambda path, start: clip(PyavVideo(path), start)
    yield "plain PyAV", read_plainly
    yield "decord", lambda path, start: clip(DecordVideo(path), start)
    try:
        check_decoder(Decoder(name="torchcodec"))
    except ConfigError as error:
        print(f"without torchcodec: {error}")
        return
    yield "torchcodec exact", lambda path, start: clip(TorchcodecVideo(path), start)
    yield "torchcodec approximate", lambda path, start: clip(TorchcodecVideo(path, "approximate"), start)


def uncached(path: str) -> Video:
    """Open a file as one that was not read before."""
    INDICES.clear()
    return PyavVideo(path)


def clip(video: Video, start: int) -> np.ndarray:
    """Decode the clip that starts at a frame."""
    return video.frames_at(start + FRAME_STEP * np.arange(NUM_FRAMES))


def read_plainly(path: str, start: int) -> list[np.ndarray]:
    """As in PyAV's cookbook: seek by the average rate and decode all frames to the end of the clip."""
    frames = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(start / stream.average_rate / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.pts * stream.time_base * stream.average_rate)
            if number >= start + NUM_FRAMES * FRAME_STEP:
                break
            if number >= start and (number - start) % FRAME_STEP == 0:
                frames.append(frame.to_ndarray(format="rgb24"))
    return frames


def bytes_read() -> int:
    """Bytes that this process has read from files, cached by the operating system or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def repeated(path: str, target: Path, times: int) -> str:
    """Write a video `times` times in a row to another file, without encoding it again."""
    with av.open(path) as reader, av.open(str(target), "w") as writer:
        source = reader.streams.video[0]
        stream = writer.add_stream_from_template(source)
        packets = [packet for packet in reader.demux(source) if packet.size]
        length = int(len(packets) * Fraction(1, FPS) / source.time_base)
        for number in range(times):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + number * length, packet.dts + number * length
                copy.time_base, copy.is_keyframe, copy.stream = source.time_base, packet.is_keyframe, stream
                writer.mux(copy)
    return str(target)


def _result(measured: list[tuple[float, float]]) -> str:
    duration, size = (statistics.median(column) for column in zip(*measured, strict=True))
    return f"{duration * 1e3:.0f} ms, {size / 1e6:.1f} MB"
