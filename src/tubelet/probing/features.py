"""Tokens of labelled videos under a frozen encoder: computed for each batch, or extracted once and stored on disk."""

import dataclasses
import logging
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tubelet.config import ConfigError
from tubelet.grid import Grid
from tubelet.probing.cache import FeatureCache, StoredTokens
from tubelet.probing.clips import LabelledClips
from tubelet.probing.encoder import FrozenEncoder
from tubelet.probing.heads import Reads, pool
from tubelet.probing.memory import available_bytes
from tubelet.runtime.progress import progress
from tubelet.runtime.transfer import to_device
from tubelet.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**28
"""Approximate size of a file of the cache, which is also what an interrupted extraction can lose."""
IGNORED = -100
"""The label that cross-entropy leaves out."""


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """This process's part of a batch.

    A process whose part is empty has no indices, and zeros with the label IGNORED: it trains the heads in step with
    the others.

    Attributes:
        tokens: [B, segments, views, N, D] on the encoder's device.
        labels: int64 [B] on the encoder's device.
        indices: int64 [B], the samples' indices.
        num_global: Number of samples over all processes.
    """

    tokens: Tensor
    labels: Tensor
    indices: Tensor
    num_global: int = 0

    def __len__(self) -> int:
        return len(self.indices)


class Features:
    """The tokens of `clips` under `encoder`; each process has its part of them.

    Args:
        clips: Labelled videos.
        encoder: Frozen encoder.
        watchdog: Receives notes on the progress.
        segments: Clips of a video, one from each of as many equal parts of it.
        reads: What is kept of a clip: all tokens, their mean (N = 1), or the mean of each time slot (N = t).
        grid: Token grid of a clip.

    Attributes:
        excluded: Path -> reason, of the files that no process could read so far.
    """

    def __init__(
        self,
        clips: LabelledClips,
        encoder: FrozenEncoder,
        watchdog: Watchdog,
        *,
        segments: int,
        reads: Reads,
        grid: Grid,
    ):
        self.clips, self.encoder, self.watchdog, self.world = clips, encoder, watchdog, watchdog.world
        self.excluded: dict[str, str] = {}
        self._segments, self._reads, self._grid = segments, reads, grid
        self._labels = torch.tensor(np.asarray(clips.labels), dtype=torch.int64)
        self._stored: Tensor | StoredTokens | None = None
        self._rows = torch.full((len(clips),), -1)  # of each sample in `_stored`

    def extract(self, indices: Tensor, folder: Path, batch_size: int, memory_fraction: float) -> None:
        """Take this process's part of the samples `indices` from the cache in `folder` from now on.

        Missing features are computed first. Each sample belongs to one process. Features that fit are held in memory,
        others are read from disk for each batch; the results are the same.

        Args:
            indices: int64 [n].
            folder: Folder of the cache.
            batch_size: Videos of a forward pass of the encoder.
            memory_fraction: Fraction of the available host memory that all processes of a host may fill.
        """
        encoder = self.encoder
        key = f"{encoder.fingerprint} {encoder.dtype} {encoder.mean} {encoder.std} {self.clips.description}"
        cache = FeatureCache(folder, key)
        part = indices[self.world.rank :: self.world.world_size]
        self._compute_missing(cache, [i for i in part.tolist() if self.clips.paths[i] not in cache], batch_size)
        if not self.readable(indices).any():
            raise ConfigError(f"{self.clips.source}: none of the {len(indices)} videos can be read: {self.excluded}")
        readable = part[self.readable(part)]
        # Measured before any process of the host fills memory.
        hosts = self.world.all_gather_object(socket.gethostname())
        budget = int(memory_fraction * available_bytes() / hosts.count(hosts[self.world.rank]))
        self.world.all_gather_object(None)
        paths = [self.clips.paths[i] for i in readable.tolist()]
        self._stored = self._open(cache, paths, budget) if paths else torch.empty(0)
        self._rows[readable] = torch.arange(len(readable))

    def readable(self, indices: Tensor) -> Tensor:
        """Which of the samples `indices` have not been excluded so far, bool [n]."""
        return torch.tensor([self.clips.paths[i] not in self.excluded for i in indices.tolist()], dtype=torch.bool)

    def batches(self, batches: Sequence[Tensor], epoch: int = 0) -> Iterator[TokenBatch]:
        """This process's part of each batch of sample indices, without the excluded samples."""
        stored = self._stored
        if stored is None:
            # The encoder is most of the work, so each process gets an equal part.
            parts = [indices.tensor_split(self.world.world_size)[self.world.rank] for indices in batches]
            for batch in self._encoded(parts, epoch):
                yield dataclasses.replace(batch, tokens=self._reduce(batch.tokens))
        else:
            parts = [indices[self._rows[indices] >= 0] for indices in batches]
            yield from self._in_step((self._read(stored, indices) for indices in parts), len(parts))

    def gather(self, batches: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Apply `function` to the tokens of the samples of all processes.

        Args:
            batches: Sample indices of each batch.
            function: Maps tokens [B, segments, views, N, D] to a tensor [B, …].

        Returns:
            The results [n, …] and the labels [n], on the CPU and sorted by sample. So they, and sums over them, do not
            depend on the number of processes.
        """
        part = [
            (batch.indices, function(batch.tokens).cpu(), batch.labels.cpu())
            for batch in self.batches(batches)
            if len(batch)
        ]
        parts = [batch for part in self.world.all_gather_object(part) for batch in part]
        if not parts:
            raise ConfigError(f"{self.clips.source}: none of the videos can be read: {self.excluded}")
        indices, values, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = indices.argsort()
        return values[order], labels[order]

    def _open(self, cache: FeatureCache, paths: list[str], budget: int) -> Tensor | StoredTokens:
        stored = cache.open(paths)
        if self._reads != "tokens" or stored.nbytes <= budget:  # means are much smaller
            return stored.load(self._reduce)
        logger.warning(
            "%s: %.1f GiB of features do not fit into %.1f GiB of memory (data.feature_memory); they are read from %s "
            "for each batch",
            self.clips.source,
            stored.nbytes / 2**30,
            budget / 2**30,
            cache.folder,
        )
        return stored

    def _in_step(self, batches: Iterator[TokenBatch], count: int) -> Iterator[TokenBatch]:
        """Yield each batch, with its `num_global`, when all processes have their part of it.

        So no process gets ahead of the others by more than a batch: those would wait in a collective until it times
        out.
        """
        known = dict(self.excluded)
        for number in range(count):
            self.watchdog.note(f"batch {number + 1} of {count} of {self.clips.source}")
            batch = next(batches)
            new = {path: reason for path, reason in self.excluded.items() if path not in known}
            sizes, excluded = zip(*self.world.all_gather_object((len(batch), new)), strict=True)
            for part in excluded:
                self.excluded |= part
            known |= self.excluded
            yield dataclasses.replace(batch, num_global=sum(sizes))

    def _read(self, stored: Tensor | StoredTokens, indices: Tensor) -> TokenBatch:
        device = self.encoder.device
        if len(indices) == 0:
            empty = self._empty()
            return dataclasses.replace(empty, tokens=self._reduce(empty.tokens))
        tokens = to_device(stored[self._rows[indices]], device)
        return TokenBatch(tokens, to_device(self._labels[indices], device), indices)

    def _encoded(self, batches: Sequence[Tensor], epoch: int) -> Iterator[TokenBatch]:
        return self._in_step(self._encode(batches, epoch), len(batches))

    def _encode(self, batches: Sequence[Tensor], epoch: int) -> Iterator[TokenBatch]:
        for batch in self.clips.batches(batches, epoch):
            self.excluded |= {bad.path: bad.reason for bad in batch.bad}
            if len(batch) == 0:
                yield self._empty()
                continue
            clips = rearrange(batch.clips, "(B n) C T H W -> B n C T H W", B=len(batch))
            tokens = rearrange(self.encoder(clips), "B (s v) N D -> B s v N D", s=self._segments)
            labels = batch.labels.to(tokens.device, non_blocking=True)
            yield TokenBatch(tokens, labels, batch.indices)

    def _empty(self) -> TokenBatch:
        device, embed_dim = self.encoder.device, self.encoder.module.embed_dim
        shape = (1, self._segments, 1, self._grid.num_tokens, embed_dim)
        tokens = torch.zeros(shape, dtype=self.encoder.dtype, device=device)
        return TokenBatch(tokens, torch.tensor([IGNORED], device=device), torch.empty(0, dtype=torch.int64))

    def _reduce(self, tokens: Tensor) -> Tensor:
        """Tokens [B, segments, views, N, D] -> what is kept of them."""
        return reduce(tokens, self._reads, self._grid, type(self.encoder.module).__name__)

    def _compute_missing(self, cache: FeatureCache, missing: list[int], batch_size: int) -> None:
        """Compute the features of the samples `missing` of this process; all processes keep in step."""
        lengths = self.world.all_gather_object(len(missing))
        total, rounds = sum(lengths), -(-max(lengths) // batch_size)
        batches = [torch.tensor(missing[i * batch_size : (i + 1) * batch_size]).long() for i in range(rounds)]
        bar = progress(desc="features", total=total, unit="video", off=total == 0 or not self.world.is_main)
        pending: list[TokenBatch] = []
        remaining = total
        for batch in self._encoded(batches, epoch=0):
            if len(batch):
                if not pending:
                    _check_disk_space(cache.folder, batch.tokens[0].nbytes * remaining)
                pending.append(batch)
            if sum(b.tokens.nbytes for b in pending) > SHARD_BYTES:
                self._write(cache, pending)
                pending = []
            remaining -= batch.num_global
            bar.update(batch.num_global)
        if pending:
            self._write(cache, pending)
        bar.close()

    def _write(self, cache: FeatureCache, batches: list[TokenBatch]) -> None:
        paths = [self.clips.paths[i] for batch in batches for i in batch.indices.tolist()]
        cache.add(paths, torch.cat([batch.tokens.cpu() for batch in batches]))


def reduce(tokens: Tensor, reads: Reads, grid: Grid, encoder: str) -> Tensor:
    """Reduce the tokens of clips to what is kept of them.

    Args:
        tokens: [..., N, D] in time-major order.
        reads: All tokens, their mean or the mean of each time slot.
        grid: Token grid of a clip.
        encoder: Name of the encoder, for messages.

    Returns:
        The tokens unchanged, or float32 [..., 1, D] or [..., t, D].

    Raises:
        ConfigError: There are other tokens than those of the grid, so that time slots are unknown.
    """
    if reads == "tokens":
        return tokens
    if reads == "mean":
        return pool(tokens, 1)
    if tokens.shape[-2] != grid.num_tokens:
        raise ConfigError(
            f"time slots cannot be read: {encoder} returns {tokens.shape[-2]} tokens for a clip with a grid of "
            f"{' × '.join(map(str, grid))}; choose a head or features of all tokens or of their mean"
        )
    return pool(tokens, grid.t)


def _check_disk_space(folder: Path, num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ConfigError(
            f"data.cache_features: the features take {num_bytes / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} "
            "left; name a folder on another disk, or set cache_features: false"
        )
