"""Videos as small animations in a page."""

import base64
import functools
from collections.abc import Iterable

import numpy as np

from tubelet.data import Decoder, VideoError
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.image_dataset import read_image
from tubelet.features.store import Items
from tubelet.report.figures import to_gif
from tubelet.report.html_parts import escape

FRAMES = 8
FRAMES_PER_SECOND = 4.0
MAX_HEIGHT = 72


class Strips:
    """Rows of animations of items, read from their files.

    Args:
        decoder: See `open_video`.

    Attributes:
        missing: Path -> reason, of files that could not be read.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.missing: dict[str, str] = {}
        self._gif = functools.cache(self._read)

    def row(self, items: Items, entries: Iterable[tuple[int, str]]) -> str:
        """The (item, caption) of each of `entries` side by side, as HTML."""
        figures = [self._figure(items, item, caption) for item, caption in entries]
        return '<div style="display: flex; flex-wrap: wrap; gap: 0 .8rem">' + "".join(figures) + "</div>"

    def _figure(self, items: Items, item: int, caption: str) -> str:
        path = items.paths[item]
        gif = self._gif(path, float(items.starts[item]), float(items.ends[item]))
        title = escape(path)
        if gif is None:
            picture = f'<p class="missing" title="{title}">{escape(self.missing[path])}</p>'
        else:
            data = base64.b64encode(gif).decode()
            picture = f'<img alt="{title}" title="{title}" src="data:image/gif;base64,{data}">'
        caption = f"<figcaption>{escape(caption)}</figcaption>"
        return f'<figure style="margin: .4rem 0; max-width: 12rem">{picture}{caption}</figure>'

    def _read(self, path: str, start: float, end: float) -> bytes | None:
        """An animation of the frames from `start` to `end`, seconds; None where the file cannot be read.

        Images have no times.
        """
        try:
            if np.isnan(start):
                return _gif(read_image(path)[None])
            video = open_video(path, self.decoder)
            first, stop = (min(round(t * video.fps), video.num_frames) for t in (start, end))
            numbers = np.unique(np.linspace(min(first, stop - 1), stop - 1, FRAMES).round().astype(int))
            return _gif(read_frames(video, numbers, path))
        except VideoError as error:
            self.missing[path] = f"not available: {error.reason}"
            return None

    def notes(self) -> list[str]:
        """HTML that says which files could not be read."""
        if not self.missing:
            return []
        return [f"<p>{len(self.missing)} of the videos on this page cannot be read; their captions say why.</p>"]


def _gif(frames: np.ndarray) -> bytes:
    return to_gif(frames, FRAMES_PER_SECOND, min(MAX_HEIGHT, frames.shape[1]))
