"""Decoding with torchcodec, on the CPU or on a GPU."""

import functools
import io
from fractions import Fraction

import numpy as np
import torch

from tubelet.config import ConfigError
from tubelet.data.decoders.files import PathOrFile, first_line, name_of, readable
from tubelet.data.decoders.frame_index import FrameIndex
from tubelet.data.decoders.pyav import PyavVideo, index_of
from tubelet.data.options import SeekMode
from tubelet.data.types import VideoError


class TorchcodecVideo:
    """torchcodec; it needs the shared libraries of an FFmpeg installation.

    Frames that it rejects are read with PyAV: those of another size than the first. Damaged ones fail there, too.

    Args:
        source: The file.
        seek_mode: "exact" reads the whole file for its index; "approximate" takes number and times of the frames from
            the header and a constant rate.
        device: "cpu", or "cuda" for the decoder of the current GPU.

    Raises:
        ImportError: torchcodec finds no FFmpeg.
        ConfigError: GPU decoding in a worker process.
    """

    def __init__(self, source: PathOrFile, seek_mode: SeekMode = "exact", device: str = "cpu"):
        if device != "cpu" and torch.utils.data.get_worker_info() is not None:
            raise ConfigError(f"data.decoder.device: {device}: a worker process cannot use the GPU; set num_workers: 0")
        self._source, self._seek_mode = source, seek_mode
        self._decoder = _open(source, seek_mode, device)
        self.num_frames = len(self._decoder)

    @functools.cached_property
    def _index(self) -> FrameIndex:
        if self._seek_mode == "exact":
            return index_of(self._source, self.num_frames, "torchcodec")
        rate = Fraction(self._decoder.metadata.average_fps or 0)
        if not rate > 0:
            raise VideoError(name_of(self._source), "its header has no frame rate; set data.decoder.seek_mode to exact")
        numbers = np.arange(self.num_frames)
        return FrameIndex(numbers, numbers, 1 / rate, float(rate))

    @property
    def fps(self) -> float:
        return self._index.fps

    @property
    def times(self) -> np.ndarray:
        return self._index.seconds

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        try:
            return self._decoder.get_frames_at(indices.tolist()).data.cpu().numpy()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return PyavVideo(self._source).frames_at(indices)


def check_device(device: str) -> None:
    """Decode a small video on a device.

    Raises:
        ImportError: torchcodec finds no FFmpeg.
        ConfigError: It cannot decode there.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"data.decoder.device: {device}: torch finds no GPU; set it to cpu")
    try:
        decoder = _open(io.BytesIO(_small_video()), "exact", device)
        decoder.get_frame_at(0)
    except ImportError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(
            f"data.decoder.device: {device}: torchcodec cannot decode: {reason}; set it to cpu"
        ) from error
    if device != "cpu" and decoder.cpu_fallback:
        raise ConfigError(f"data.decoder.device: {device}: {decoder.cpu_fallback}; set it to cpu")


def _open(source: PathOrFile, seek_mode: SeekMode, device: str):
    from torchcodec.decoders import VideoDecoder

    try:
        return VideoDecoder(
            readable(source), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode, device=device
        )
    except RuntimeError as error:
        if "Could not load libtorchcodec" in str(error):  # not the video's fault
            raise ImportError("torchcodec finds no FFmpeg: install it, or set data.decoder to pyav") from error
        raise


def _small_video() -> bytes:
    """An h264 file of a few gray frames, of a size that hardware decoders take."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height = stream.width = 256
        stream.pix_fmt = "yuv420p"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.full((256, 256, 3), 128, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
