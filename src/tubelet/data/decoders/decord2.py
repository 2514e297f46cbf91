"""Decoding with decord2."""

import functools

import numpy as np

from tubelet.data.decoders.files import PathOrFile, readable
from tubelet.data.decoders.frame_index import FrameIndex
from tubelet.data.decoders.pyav import PyavVideo, index_of


class DecordVideo:
    """decord2; frames that it rejects are read with PyAV.

    It rejects valid files of some small widths (16, 24, 32, 48, 96, 144 pixels), where it mistakes its
    row padding for color channels. Damaged files fail in PyAV, too. A file-like object is read into memory completely.
    """

    def __init__(self, source: PathOrFile):
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # the exception has the message
        self._source = source
        self._reader = decord.VideoReader(readable(source), num_threads=1)
        self.num_frames = len(self._reader)

    @functools.cached_property
    def _index(self) -> FrameIndex:
        return index_of(self._source, self.num_frames, "decord")

    @property
    def fps(self) -> float:
        return self._index.fps

    @property
    def times(self) -> np.ndarray:
        return self._index.seconds

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        from decord import DECORDError

        try:
            return self._reader.get_batch(indices).asnumpy()
        except DECORDError:
            return PyavVideo(self._source).frames_at(indices)
