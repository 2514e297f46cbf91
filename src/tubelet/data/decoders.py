"""Three video decoding libraries behind one small interface.

`open_video(source, "pyav" | "decord" | "torchcodec")` gives a `Video` with the same frames from each. PyAV, which can
skip frames that no requested frame depends on, is the fastest (`python -m benchmarks loader`). Frame i is the i-th in
presentation order, upright (the file's rotation is applied), as 8-bit RGB. A video decodes in a single thread, because
the workers of a loader use all cores already.
"""

import io
import itertools
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import numpy as np

from tubelet.data.types import VideoError

MAX_DROPPED = 8
"""Frames by which the index of a file without presentation times may exceed the frames that it decodes to."""


class Video(Protocol):
    """An open video.

    Attributes:
        num_frames: Number of frames according to the file's index.
        fps: Average frames per second.
    """

    num_frames: int
    fps: float

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3], one frame for each of the ascending `indices` (repeats allowed)."""
        ...


class FileView(io.RawIOBase):
    """A file-like object with a separate read position, so that several readers can use the same underlying object."""

    def __init__(self, file: BinaryIO):
        self._file, self._position = file, 0
        self.name = name_of(file)

    def read(self, size: int = -1) -> bytes:
        self._file.seek(self._position)
        content = self._file.read(size)
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


PathOrFile = str | BinaryIO
"""Path of a file, or a binary file-like object with `read` and `seek`; it is read from its beginning."""


class DecordVideo:
    """decord2; frames that it rejects are read with PyAV.

    It rejects valid files of some small widths (16, 24, 32, 48, 96, 144 pixels), where it mistakes its
    row padding for color channels. Damaged files fail in PyAV, too. A file-like object is read into memory completely.
    """

    def __init__(self, source: PathOrFile):
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # the exception has the message
        self._source = source
        self._reader = decord.VideoReader(_readable(source), num_threads=1)
        self.num_frames, self.fps = len(self._reader), float(self._reader.get_avg_fps())

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        from decord import DECORDError

        try:
            return self._reader.get_batch(indices).asnumpy()
        except DECORDError:
            return PyavVideo(self._source).frames_at(indices)


class PyavVideo:
    """PyAV: the time stamps of all packets are the index; decoding starts at the nearest key frame.

    Between the key frame and a requested frame, frames that no other frame refers to (most B frames) are not decoded.
    """

    def __init__(self, source: PathOrFile):
        import av

        av.logging.set_level(av.logging.PANIC)
        self._source = source
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
        """A new container and its video stream, set to decode in one thread."""
        import av

        container = av.open(_readable(self._source))
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("no video stream in this file")
        stream.codec_context.thread_count = 1
        return container, stream

    def _by_time(self, indices: np.ndarray) -> list[np.ndarray] | None:
        """Decode the frames with the time stamps of `indices`; None if frames and packets differ in time stamps."""
        times, frames, to_rgb = self._times[indices].tolist(), [], _ToRgb()
        wanted, decoded = set(times), iter(())
        now: int | None = None
        for time in times:
            key_time = self._key_time_before(time)
            if now is None or key_time is not None and key_time > now:
                self._container.seek(int(key_time or 0), stream=self._stream)
                decoded, now = self._decode(wanted), None
            while now is None or now < time:
                frame = next(decoded, None)
                if frame is None or frame.pts is None or now is not None and frame.pts <= now:
                    return None
                now = frame.pts
            if now != time:
                return None
            frames.append(to_rgb(frame))
        return frames

    def _decode(self, wanted: set[int]) -> Iterator:
        """Yield frames from the current position on; those neither requested nor referred to may be missing."""
        codec = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from codec.decode(packet)

    def _key_time_before(self, time: int) -> int | None:
        following = np.searchsorted(self._key_times, time, side="right")
        return self._key_times[following - 1] if following else None

    def _by_counting(self, indices: np.ndarray) -> list[np.ndarray]:
        """Decode from the beginning and count; the last frame replaces a few missing ones at the end.

        The index of a file without presentation times may count frames that were dropped by the encoder.
        """
        last, frames, number, frame = int(indices[-1]), {}, -1, None
        wanted, to_rgb = set(indices.tolist()), _ToRgb()
        container, stream = self._open()
        with container:
            for number, frame in enumerate(itertools.islice(container.decode(stream), last + 1)):
                if number in wanted:
                    frames[number] = to_rgb(frame)
        if frame is None or last - number > MAX_DROPPED:
            raise ValueError(f"the file ends after {number + 1} of the {self.num_frames} frames in its index")
        return [frames[i] if i <= number else to_rgb(frame) for i in indices.tolist()]


class _ToRgb:
    """PyAV frames to upright uint8 [H, W, 3]; bicubic chroma, like decord and torchcodec.

    One reformatter serves all frames, because it builds its tables on first use.
    """

    def __init__(self):
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()

    def __call__(self, frame) -> np.ndarray:
        pixels = self._reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
        return np.rot90(pixels, k=frame.rotation // 90 % 4)


class TorchcodecVideo:
    """torchcodec; it needs the shared libraries of an FFmpeg installation."""

    def __init__(self, source: PathOrFile):
        from torchcodec.decoders import VideoDecoder

        try:
            self._decoder = VideoDecoder(_readable(source), dimension_order="NHWC", num_ffmpeg_threads=1)
        except RuntimeError as error:
            if "Could not load libtorchcodec" in str(error):  # not the video's fault
                raise ImportError("torchcodec finds no FFmpeg: install it, or set data.decoder to decord") from error
            raise
        self.num_frames, self.fps = len(self._decoder), float(self._decoder.metadata.average_fps or 0)

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        return self._decoder.get_frames_at(indices.tolist()).data.numpy()


DECODERS: dict[str, Callable[[PathOrFile], Video]] = {
    "decord": DecordVideo,
    "pyav": PyavVideo,
    "torchcodec": TorchcodecVideo,
}


def open_video(source: PathOrFile, decoder: str) -> Video:
    """Open a video with one of `DECODERS`.

    Args:
        source: Path of the file, or a binary file-like object with `read` and `seek`, which is read from its beginning
            and must stay open as long as the video is used.
        decoder: "pyav", "decord" or "torchcodec".

    Raises:
        VideoError: The file cannot be opened or has no frames.
        ImportError: The decoder is not installed.

    Example:
        >>> video = open_video(io.BytesIO(content), "pyav")
        >>> frames = read_frames(video, np.arange(16), "clip")  # uint8 [16, H, W, 3]
    """
    try:
        video = DECODERS[decoder](source)
    except ImportError:
        raise
    except Exception as error:
        raise VideoError(name_of(source), f"{decoder} cannot open it: {first_line(error)}") from error
    if video.num_frames < 1 or not video.fps > 0:
        raise VideoError(name_of(source), f"{decoder} finds {video.num_frames} frames at {video.fps} frames per second")
    return video


def read_frames(video: Video, indices: np.ndarray, path: str) -> np.ndarray:
    """Decode the frames `indices`, which may be in any order.

    Args:
        video: An open video.
        indices: Frame numbers [T].
        path: Name of the video in error messages.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        VideoError: Decoding fails or gives frames of another number or type.
    """
    unique, inverse = np.unique(indices, return_inverse=True)
    try:
        frames = video.frames_at(unique)
    except Exception as error:
        raise VideoError(path, f"cannot decode frames {unique[0]}..{unique[-1]}: {first_line(error)}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[0] != len(unique) or frames.shape[3] != 3:
        raise VideoError(path, f"decoding {len(unique)} frames gave {frames.dtype} {list(frames.shape)}")
    return frames if len(unique) == len(indices) else frames[inverse]


def name_of(source: PathOrFile) -> str:
    """Return the path, or the `name` of a file-like object if it has one."""
    return source if isinstance(source, str) else str(getattr(source, "name", "(file-like object)"))


def first_line(error: Exception) -> str:
    """Return type and first line of an error of a C++ library, whose other lines are a stack trace."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _readable(source: PathOrFile) -> str | FileView:
    return source if isinstance(source, str) else FileView(source)
