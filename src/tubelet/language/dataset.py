"""Videos with texts: each sample is a clip, a prompt and the text that follows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tubelet.data import DataConfig
from tubelet.data.rows import Numbers, Strings
from tubelet.data.sources import NO_LABEL, Source
from tubelet.data.video_dataset import Dataset, Transform, Views
from tubelet.language.tokenizer import IGNORED, TextEncoder


@dataclass(frozen=True)
class TextSample:
    """A video file, what is asked about it (possibly nothing), and what is to be written.

    Attributes:
        answer: Number of the answer where answers are classified.
    """

    path: str
    prompt: str
    target: str
    answer: int = IGNORED


class VideoFiles(Dataset):
    """The clips of given files, one sample each.

    Args:
        data: How clips are made; its `datasets` are not read.
        transform: See `tubelet.data.transforms`.
        files: Path of each sample.
        kwargs: Further arguments of `Dataset`.
    """

    def __init__(self, data: DataConfig, transform: Transform, files: Sequence[str], **kwargs: Any):
        self._files = files
        super().__init__(data, transform, **kwargs)

    def find_samples(self, entry: str) -> Source:
        return Source(Strings(self._files), Numbers(np.full(len(self._files), NO_LABEL)))


class TextVideos(VideoFiles):
    """Clips of videos with the token numbers of their texts, `prompt`, `prompt_used` and `target`, see `TextEncoder`,
    and the number of their `answer`.

    A video that cannot be read is replaced together with its texts.

    Args:
        data: How clips are made.
        transform: See `tubelet.data.transforms`.
        samples: The samples; several may have the same video.
        text: Encodes the texts.
        tokens: Path -> features of its clip [N, D] under a frozen encoder, which are then the view `tokens`; None to
            read the clips.
        kwargs: Further arguments of `Dataset`.
    """

    def __init__(
        self,
        data: DataConfig,
        transform: Transform,
        samples: Sequence[TextSample],
        text: TextEncoder,
        tokens: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ):
        self.tokens = tokens
        self._prompt, self._prompt_used = text.prompts([sample.prompt for sample in samples])
        self._target = text.targets([sample.target for sample in samples])
        self._answer = [sample.answer for sample in samples]
        super().__init__(data, transform, [sample.path for sample in samples], **kwargs)

    def read_views(self, path: str, rng: np.random.Generator) -> tuple[Views, np.ndarray]:
        if self.tokens is None:
            return super().read_views(path, rng)
        return {"tokens": self.tokens[path][None]}, np.zeros((1, 0), np.int64)

    def targets(self, index: int) -> dict[str, Any]:
        return {
            "prompt": self._prompt[index],
            "prompt_used": self._prompt_used[index],
            "target": self._target[index],
            "answer": self._answer[index],
        }
