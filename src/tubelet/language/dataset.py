"""Videos with texts: each sample is a clip, a prompt and the text that follows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
    and the number of their `answer`. `video_number` and `text_number` are equal for equal paths and for equal targets.
    These targets of a clip are [texts_per_video, …].

    A video that cannot be read is replaced together with its texts.

    Args:
        data: How clips are made.
        transform: See `tubelet.data.transforms`.
        samples: Videos with a text each; several may have the same video.
        text: Encodes the texts.
        texts_per_video: Texts of a video that share a clip. Where their number is no multiple of it, some are repeated.
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
        *,
        texts_per_video: int = 1,
        **kwargs: Any,
    ):
        self.tokens = tokens
        self._prompt, self._prompt_used = text.prompts([sample.prompt for sample in samples])
        self._target = text.targets([sample.target for sample in samples])
        self._answer = torch.tensor([sample.answer for sample in samples])
        self._video_number = _number([sample.path for sample in samples])
        # of the tokens and not of the text, as texts that are cut to the same tokens cannot be told apart either
        different, self._text_number = self._target.unique(dim=0, return_inverse=True)
        self.num_different_texts = len(different)
        self._texts = _groups([sample.path for sample in samples], texts_per_video)
        super().__init__(data, transform, [samples[texts[0]].path for texts in self._texts], **kwargs)

    def read_views(self, path: str, rng: np.random.Generator) -> tuple[Views, np.ndarray]:
        if self.tokens is None:
            return super().read_views(path, rng)
        return {"tokens": self.tokens[path][None]}, np.zeros((1, 0), np.int64)

    def targets(self, index: int) -> dict[str, Any]:
        texts = self._texts[index]
        return {
            "prompt": self._prompt[texts],
            "prompt_used": self._prompt_used[texts],
            "target": self._target[texts],
            "answer": self._answer[texts],
            "video_number": self._video_number[texts],
            "text_number": self._text_number[texts],
        }


def _number(paths: Sequence[str]) -> Tensor:
    """Return a number of each path, int64 [len(paths)], which is equal for equal paths."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(path, len(numbers)) for path in paths], dtype=torch.int64)


def _groups(paths: Sequence[str], size: int) -> list[list[int]]:
    """Return numbers of equal paths in groups of `size`; the last group of a path is filled with its first numbers."""
    if size == 1:
        return [[number] for number in range(len(paths))]
    of_path: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        of_path.setdefault(path, []).append(number)
    return [
        [numbers[i % len(numbers)] for i in range(first, first + size)]
        for numbers in of_path.values()
        for first in range(0, len(numbers), size)
    ]
