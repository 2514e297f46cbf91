"""Three libraries that decode videos, behind one small interface.

`open_video(path, "pyav" | "decord" | "torchcodec")` gives a `Video`, with the same frames from each. PyAV, which can be
told to leave pictures out, is the fastest (`python -m benchmarks loader`). Frame i is the i-th in order of
presentation, upright (a rotation noted in the file is applied), as 8-bit RGB. Each video decodes in one thread: the
workers of a loader share the cores already.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from tubelet.data import VideoError

MAX_DROPPED = 8  # pictures that the index of a file without presentation times may count too much


class Video(Protocol):
    """An opened video. num_frames: as the file's index says; fps: frames a second, on average."""

    num_frames: int
    fps: float

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3], one frame for each of the ascending `indices` (repeats allowed)."""
        ...


class DecordVideo:
    """decord2; frames that it refuses are read through PyAV.

    It refuses sound files of some small widths (16, 24, 32, 48, 96, 144 pixels), because it takes its own padding of
    rows for further colour channels. What is damaged fails in PyAV too.
    """

    def __init__(self, path: str):
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # what goes wrong is in the exception
        self._path = path
        self._reader = decord.VideoReader(path, num_threads=1)
        self.num_frames, self.fps = len(self._reader), float(self._reader.get_avg_fps())

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        from decord import DECORDError

        try:
            return self._reader.get_batch(indices).asnumpy()
        except DECORDError:
            return PyavVideo(self._path).frames_at(indices)


class PyavVideo:
    """PyAV: the time stamps of all packets are the index; decoding starts at the nearest key frame.

    On the way to the frames that are wanted, pictures that no other picture refers to (most B frames) are not decoded.
    """

    def __init__(self, path: str):
        import av

        av.logging.set_level(av.logging.PANIC)
        self._path = path
        self._container, self._stream = self._open()
        packets = [packet for packet in self._container.demux(self._stream) if packet.size and packet.pts is not None]
        self._times = np.sort([packet.pts for packet in packets])
        self._key_times = np.sort([packet.pts for packet in packets if packet.is_keyframe])
        self.num_frames, self.fps = len(packets), float(self._stream.average_rate or 0)
        self._without_times = self._container.format.name == "avi"  # its time stamps are FFmpeg's guess

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        frames = None if self._without_times else self._by_time(indices)
        return np.stack(frames or self._by_counting(indices))

    def _open(self) -> tuple:
        """The file and its video, to be decoded in one thread."""
        import av

        container = av.open(self._path)
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("no video in this file")
        stream.codec_context.thread_count = 1
        return container, stream

    def _by_time(self, indices: np.ndarray) -> list[np.ndarray] | None:
        """The frames with the time stamps of `indices`; None where the frames' stamps are not the packets'."""
        times, frames, upright = self._times[indices].tolist(), [], _Upright()
        wanted, decoded, now = set(times), None, None
        for time in times:
            key = self._key_before(time)
            if decoded is None or key is not None and key > now:
                self._container.seek(int(key or 0), stream=self._stream)
                decoded, now = self._decode(wanted), None
            while now is None or now < time:
                frame = next(decoded, None)
                if frame is None or frame.pts is None or now is not None and frame.pts <= now:
                    return None
                now = frame.pts
            if now != time:
                return None
            frames.append(upright(frame))
        return frames

    def _decode(self, wanted: set[int]) -> Iterator:
        """The frames from here on; those that are neither wanted nor referred to may be missing."""
        codec = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from codec.decode(packet)

    def _key_before(self, time: int) -> int | None:
        place = np.searchsorted(self._key_times, time, side="right")
        return self._key_times[place - 1] if place else None

    def _by_counting(self, indices: np.ndarray) -> list[np.ndarray]:
        """Frame i is the i-th that comes out when everything is decoded; the last stands for a few that are missing.

        Files without presentation times may count pictures that were dropped, and end that much too soon.
        """
        last, frames, number, frame = int(indices[-1]), {}, -1, None
        wanted, upright = set(indices.tolist()), _Upright()
        container, stream = self._open()
        with container:
            for number, frame in enumerate(itertools.islice(container.decode(stream), last + 1)):
                if number in wanted:
                    frames[number] = upright(frame)
        if frame is None or last - number > MAX_DROPPED:
            raise ValueError(f"the file ends after {number + 1} of the {self.num_frames} frames in its index")
        return [frames[i] if i <= number else upright(frame) for i in indices.tolist()]


class _Upright:
    """uint8 [H, W, 3] of PyAV's frames; bicubic chroma, as decord and torchcodec have it. Its tables are made once."""

    def __init__(self):
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()

    def __call__(self, frame) -> np.ndarray:
        pixels = self._reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
        return np.rot90(pixels, k=frame.rotation // 90 % 4)


class TorchcodecVideo:
    """torchcodec; it needs the shared libraries of an installed FFmpeg."""

    def __init__(self, path: str):
        from torchcodec.decoders import VideoDecoder

        try:
            self._decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        except RuntimeError as error:
            if "Could not load libtorchcodec" in str(error):  # no fault of the video
                raise ImportError("torchcodec finds no FFmpeg: install it, or set data.decoder to decord") from error
            raise
        self.num_frames, self.fps = len(self._decoder), float(self._decoder.metadata.average_fps or 0)

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        return self._decoder.get_frames_at(indices.tolist()).data.numpy()


DECODERS: dict[str, Callable[[str], Video]] = {
    "decord": DecordVideo,
    "pyav": PyavVideo,
    "torchcodec": TorchcodecVideo,
}


def open_video(path: str, decoder: str) -> Video:
    """Raises VideoError when the file cannot be opened or holds no frame."""
    try:
        video = DECODERS[decoder](path)
    except ImportError:
        raise
    except Exception as error:
        raise VideoError(path, f"{decoder} cannot open it: {short(error)}") from error
    if video.num_frames < 1 or not video.fps > 0:
        raise VideoError(path, f"{decoder} finds {video.num_frames} frames at {video.fps} frames a second")
    return video


def read_frames(video: Video, indices: np.ndarray, path: str) -> np.ndarray:
    """`video.frames_at(indices)`, uint8 [T, H, W, 3]; raises VideoError when decoding fails or gives something else."""
    unique, inverse = np.unique(indices, return_inverse=True)
    try:
        frames = video.frames_at(unique)
    except Exception as error:
        raise VideoError(path, f"cannot decode frames {unique[0]}..{unique[-1]}: {short(error)}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[0] != len(unique) or frames.shape[3] != 3:
        raise VideoError(path, f"decoding {len(unique)} frames gave {frames.dtype} {list(frames.shape)}")
    return frames if len(unique) == len(indices) else frames[inverse]


def short(error: Exception) -> str:
    """The first line of an error of a C++ library, whose later lines are a stack trace."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
