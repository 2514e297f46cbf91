"""Tokens of labelled videos under a frozen encoder: computed anew for each batch, or once and kept on disk."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from tubelet.config import ConfigError
from tubelet.probing.cache import FeatureCache
from tubelet.probing.clips import LabelledClips
from tubelet.probing.encoder import FrozenEncoder
from tubelet.progress import progress

SHARD_BYTES = 2**28
"""Features in one file of the cache, about; what a kill during extraction can lose."""


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """tokens [B, segments, views, N, D] and labels [B] on the encoder's device; indices [B] of the samples."""

    tokens: Tensor
    labels: Tensor
    indices: Tensor


class Features:
    """The tokens of `clips` under `encoder`.

    excluded: path -> reason, of the files that could not be read so far.
    """

    def __init__(self, clips: LabelledClips, encoder: FrozenEncoder, *, segments: int, only_mean: bool = False):
        """only_mean: keep only the mean token of each clip (N = 1), which is all that a linear head reads."""
        self.clips, self.encoder = clips, encoder
        self.excluded: dict[str, str] = {}
        self._segments, self._only_mean = segments, only_mean
        self._labels = torch.tensor(clips.labels)
        self._kept: Tensor | None = None
        self._rows = torch.full((len(clips),), -1)

    def keep(self, indices: Tensor, folder: Path, batch_size: int) -> None:
        """Hold the tokens of the samples `indices` in memory, from the cache in `folder`, which is completed first."""
        cache = FeatureCache(folder, f"{self.encoder.fingerprint} {self.encoder.dtype} {self.clips.how}")
        self._complete(cache, [i for i in indices.tolist() if self.clips.paths[i] not in cache], batch_size)
        readable = indices[self.readable(indices)]
        if len(readable) == 0:
            raise ConfigError(f"{self.clips.source}: not one of the {len(indices)} videos can be read: {self.excluded}")
        self._kept = cache.read([self.clips.paths[i] for i in readable.tolist()], self._reduced)
        self._rows[readable] = torch.arange(len(readable))

    def readable(self, indices: Tensor) -> Tensor:
        """Which of the samples `indices` have not been excluded so far."""
        return torch.tensor([self.clips.paths[i] not in self.excluded for i in indices.tolist()], dtype=torch.bool)

    def batches(self, batches: Sequence[Tensor], epoch: int = 0) -> Iterator[TokenBatch]:
        """The tokens of each tensor of sample numbers; excluded samples are missing from theirs."""
        if self._kept is None:
            for batch in self._encoded(batches, epoch):
                yield dataclasses.replace(batch, tokens=self._reduced(batch.tokens))
            return
        device = self.encoder.device
        for indices in batches:
            indices = indices[self._rows[indices] >= 0]
            if len(indices):
                tokens = self._kept[self._rows[indices]]
                yield TokenBatch(tokens.to(device), self._labels[indices].to(device), indices)

    def _encoded(self, batches: Sequence[Tensor], epoch: int) -> Iterator[TokenBatch]:
        for batch in self.clips.batches(batches, epoch):
            self.excluded |= {bad.path: bad.reason for bad in batch.bad}
            if len(batch) == 0:
                continue
            clips = rearrange(batch.clips, "(B n) C T H W -> B n C T H W", B=len(batch))
            tokens = rearrange(self.encoder(clips), "B (s v) N D -> B s v N D", s=self._segments)
            yield TokenBatch(tokens, batch.labels.to(tokens.device), batch.indices)

    def _reduced(self, tokens: Tensor) -> Tensor:
        return tokens.float().mean(3, keepdim=True) if self._only_mean else tokens

    def _complete(self, cache: FeatureCache, missing: list[int], batch_size: int) -> None:
        if not missing:
            return
        bar = progress(desc="features", total=len(missing), unit="video")
        waiting: list[TokenBatch] = []
        for batch in self._encoded(torch.tensor(missing).split(batch_size), epoch=0):
            if bar.n == 0:
                _refuse_full_disk(cache.folder, batch.tokens[0].nbytes * len(missing))
            waiting.append(batch)
            if sum(b.tokens.nbytes for b in waiting) > SHARD_BYTES:
                self._write(cache, waiting)
                waiting = []
            bar.update(len(batch.indices))
        if waiting:
            self._write(cache, waiting)
        bar.close()

    def _write(self, cache: FeatureCache, batches: list[TokenBatch]) -> None:
        paths = [self.clips.paths[i] for batch in batches for i in batch.indices.tolist()]
        cache.add(paths, torch.cat([batch.tokens.cpu() for batch in batches]))


def mean_and_std(batches: Iterator[TokenBatch], attend_across_segments: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of what a linear head reads: mean tokens of videos, or of single clips."""
    means = [batch.tokens.float().mean((1, 2, 3) if attend_across_segments else 3).flatten(0, -2) for batch in batches]
    every = torch.cat(means)
    return every.mean(0), every.std(0)


def _refuse_full_disk(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"data.cache_features: the features take {needed / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} left; "
            "name a folder on another disk, or set cache_features: false"
        )
