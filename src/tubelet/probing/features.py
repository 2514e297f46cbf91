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
from tubelet.runtime.progress import progress
from tubelet.runtime.watchdog import Watchdog

SHARD_BYTES = 2**28
"""Features in one file of the cache, about; what a kill during extraction can lose."""
IGNORED = -100
"""The label that cross-entropy leaves out."""


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """This process's part of a batch: tokens [B, segments, views, N, D] and labels [B] on the encoder's device, and the
    samples' indices [B]; `of_all` counts the samples of all processes.

    A process without a part has no indices, and zeros with the label IGNORED: it trains heads in step with the others.
    """

    tokens: Tensor
    labels: Tensor
    indices: Tensor
    of_all: int = 0

    def __len__(self) -> int:
        return len(self.indices)


class Features:
    """The tokens of `clips` under `encoder`; every process has its share of them.

    excluded: path -> reason, of the files that could not be read so far, by any process.
    """

    def __init__(
        self,
        clips: LabelledClips,
        encoder: FrozenEncoder,
        watchdog: Watchdog,
        *,
        segments: int,
        only_mean: bool = False,
    ):
        """only_mean: keep only the mean token of each clip (N = 1), which is all that a linear head reads."""
        self.clips, self.encoder, self.watchdog, self.world = clips, encoder, watchdog, watchdog.world
        self.excluded: dict[str, str] = {}
        self._segments, self._only_mean = segments, only_mean
        self._labels = torch.tensor(clips.labels)
        self._kept: Tensor | None = None
        self._rows = torch.full((len(clips),), -1)

    def keep(self, indices: Tensor, folder: Path, batch_size: int) -> None:
        """Hold this process's share of the samples `indices` in memory, from the cache in `folder`.

        What the cache lacks is computed first. A sample belongs to one process, so that together they hold it once.
        """
        own = indices[self.world.rank :: self.world.world_size]
        encoder = self.encoder
        how = f"{encoder.fingerprint} {encoder.dtype} {encoder.mean} {encoder.std} {self.clips.how}"
        cache = FeatureCache(folder, how)
        self._complete(cache, [i for i in own.tolist() if self.clips.paths[i] not in cache], batch_size)
        if not self.readable(indices).any():
            raise ConfigError(f"{self.clips.source}: not one of the {len(indices)} videos can be read: {self.excluded}")
        readable = own[self.readable(own)]
        paths = [self.clips.paths[i] for i in readable.tolist()]
        self._kept = cache.read(paths, self._reduced) if paths else torch.empty(0)
        self._rows[readable] = torch.arange(len(readable))

    def readable(self, indices: Tensor) -> Tensor:
        """Which of the samples `indices` have not been excluded so far."""
        return torch.tensor([self.clips.paths[i] not in self.excluded for i in indices.tolist()], dtype=torch.bool)

    def batches(self, batches: Sequence[Tensor], epoch: int = 0) -> Iterator[TokenBatch]:
        """This process's part of each tensor of sample numbers; excluded samples are missing from theirs."""
        if self._kept is None:
            # The encoder is nearly all of the work, so it gets equal parts.
            own = [indices.tensor_split(self.world.world_size)[self.world.rank] for indices in batches]
            for batch in self._encoded(own, epoch):
                yield dataclasses.replace(batch, tokens=self._reduced(batch.tokens))
        else:
            own = [indices[self._rows[indices] >= 0] for indices in batches]
            yield from self._in_step((self._remembered(indices) for indices in own), len(own))

    def mean_and_std(self, batches: Sequence[Tensor], attend_across_segments: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [D] of what a linear head reads: mean tokens of videos, or of single clips."""
        over = (1, 2, 3) if attend_across_segments else 3
        own = [(batch.indices, batch.tokens.float().mean(over).cpu()) for batch in self.batches(batches) if len(batch)]
        indices, means = zip(*(part for parts in self.world.all_gather_object(own) for part in parts), strict=True)
        # In one order, whatever the number of processes: sums of floats depend on it.
        every = torch.cat(means)[torch.cat(indices).argsort()].flatten(0, -2)
        return every.mean(0), every.std(0)

    def _in_step(self, batches: Iterator[TokenBatch], count: int) -> Iterator[TokenBatch]:
        """Each batch when all processes have their part of it, with `of_all`.

        None gets far ahead of the others, which would then have to wait longer than a process group does.
        """
        told = dict(self.excluded)
        for number in range(count):
            self.watchdog.note(f"batch {number + 1} of {count} of {self.clips.source}")
            batch = next(batches)
            new = {path: reason for path, reason in self.excluded.items() if path not in told}
            sizes, excluded = zip(*self.world.all_gather_object((len(batch), new)), strict=True)
            for theirs in excluded:
                self.excluded |= theirs
            told |= self.excluded
            yield dataclasses.replace(batch, of_all=sum(sizes))

    def _remembered(self, indices: Tensor) -> TokenBatch:
        if len(indices) == 0:
            return self._no_part()
        device = self.encoder.device
        return TokenBatch(self._kept[self._rows[indices]].to(device), self._labels[indices].to(device), indices)

    def _encoded(self, batches: Sequence[Tensor], epoch: int) -> Iterator[TokenBatch]:
        return self._in_step(self._encode(batches, epoch), len(batches))

    def _encode(self, batches: Sequence[Tensor], epoch: int) -> Iterator[TokenBatch]:
        for batch in self.clips.batches(batches, epoch):
            self.excluded |= {bad.path: bad.reason for bad in batch.bad}
            if len(batch) == 0:
                yield self._no_part()
                continue
            clips = rearrange(batch.clips, "(B n) C T H W -> B n C T H W", B=len(batch))
            tokens = rearrange(self.encoder(clips), "B (s v) N D -> B s v N D", s=self._segments)
            yield TokenBatch(tokens, batch.labels.to(tokens.device), batch.indices)

    def _no_part(self) -> TokenBatch:
        device, width = self.encoder.device, self.encoder.module.embed_dim
        tokens = torch.zeros(1, self._segments, 1, 1, width, dtype=self.encoder.dtype, device=device)
        return TokenBatch(tokens, torch.tensor([IGNORED], device=device), torch.empty(0, dtype=torch.int64))

    def _reduced(self, tokens: Tensor) -> Tensor:
        return tokens.float().mean(3, keepdim=True) if self._only_mean else tokens

    def _complete(self, cache: FeatureCache, missing: list[int], batch_size: int) -> None:
        """Compute the samples `missing` from this process's share of the cache; processes without any keep in step."""
        lengths = self.world.all_gather_object(len(missing))
        total, rounds = sum(lengths), -(-max(lengths) // batch_size)
        nothing = torch.empty(0, dtype=torch.int64)
        parts = [
            torch.tensor(missing[i : i + batch_size], dtype=torch.int64) for i in range(0, len(missing), batch_size)
        ]
        parts += [nothing] * (rounds - len(parts))
        bar = progress(desc="features", total=total, unit="video", off=total == 0 or not self.world.is_main)
        waiting: list[TokenBatch] = []
        left = total
        for batch in self._encoded(parts, epoch=0):
            if len(batch):
                if not waiting:
                    _check_disk_space(cache.folder, batch.tokens[0].nbytes * left)
                waiting.append(batch)
            if sum(b.tokens.nbytes for b in waiting) > SHARD_BYTES:
                self._write(cache, waiting)
                waiting = []
            left -= batch.of_all
            bar.update(batch.of_all)
        if waiting:
            self._write(cache, waiting)
        bar.close()

    def _write(self, cache: FeatureCache, batches: list[TokenBatch]) -> None:
        paths = [self.clips.paths[i] for batch in batches for i in batch.indices.tolist()]
        cache.add(paths, torch.cat([batch.tokens.cpu() for batch in batches]))


def _check_disk_space(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"data.cache_features: the features take {needed / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} left; "
            "name a folder on another disk, or set cache_features: false"
        )
