"""Statistics of an encoder's features at intervals: does it collapse, does it learn?"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tubelet.data import Batch, evenly_spaced, to_float
from tubelet.data.loader import make_eval_loader
from tubelet.data.types import SampleSource
from tubelet.grid import Grid
from tubelet.runtime.distributed import World
from tubelet.runtime.precision import autocast
from tubelet.runtime.transfer import to_device
from tubelet.training.feature_statistics import TokenMoments, summarize

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MIN_CLIPS = 2


class FeatureMonitor:
    """Measures features, always of the same clips.

    The clips are read at the first `measure`, through the data loader's workers, and kept as uint8 in host memory:
    256 clips of 16 × 224 × 224 take 617 MB, divided by the number of processes, as each reads and encodes only its
    part. Reading them again each time would take longer than encoding them.

    A failure is logged as a warning and never ends the run, and all processes agree on it. The one exception is an
    error inside a sharded encoder: it leaves the other processes waiting in a collective, so it is raised.

    Args:
        make_dataset: Returns the data set, without augmentation, one clip a sample, unreadable videos excluded
            (`on_error="exclude"`). Called at the first `measure`. Labels are the target `label`.
        num_clips: Number of clips, evenly spaced over the data set; 0 turns the monitor off.
        batch_size: Clips per forward pass of a process.
        mean: Mean of each channel; see `to_float`.
        std: Standard deviation of each channel.
        world: The processes of the run.
        dtype: Autocast type of the forward pass; float32 disables autocast.
        num_workers: Worker processes that read the clips.
        timeout: Seconds to wait for a worker; see `make_eval_loader`.
    """

    def __init__(
        self,
        make_dataset: Callable[[], SampleSource],
        *,
        num_clips: int,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        world: World,
        dtype: torch.dtype = torch.float32,
        num_workers: int = 0,
        timeout: int = 0,
    ):
        self.make_dataset, self.num_clips, self.batch_size = make_dataset, num_clips, batch_size
        self.mean, self.std, self.world, self.dtype = mean, std, world, dtype
        self.num_workers, self.timeout = num_workers, timeout
        self.enabled = num_clips > 0
        self._clips: _Clips | None = None

    def measure(self, encoder: nn.Module, note: Callable[[str], None] = lambda text: None) -> dict[str, float]:
        """Return the statistics of `feature_statistics.summarize`; {} where the monitor is off or has failed.

        Every process has to call it, and gets the same figures.

        Args:
            encoder: video [B, C, T, H, W] -> tokens [B, N, D].
            note: Called with a description of the progress, as `Watchdog.note`.
        """
        if self.enabled and self._clips is None:
            self._read(note)
        clips = self._clips
        if not self.enabled or clips is None:
            return {}
        sharded = any(isinstance(module, FSDPModule) for module in encoder.modules())
        local = self._on_all_ranks(
            "measuring the features", lambda: self._encode(encoder, clips, note), must_succeed=sharded
        )
        if local is None:
            return {}
        readable = clips.readable
        table = self.world.sum(local.clips)[readable.to(local.clips.device)]
        moments = TokenMoments(table, self.world.sum(local.positions), local.slots)
        figures = self._on_all_ranks(
            "computing statistics of the features", lambda: summarize(moments, clips.labels[readable])
        )
        if figures is None:
            return {}
        if self.world.is_main and not math.isfinite(figures["spread_across"]):
            logger.warning("the features are not finite: the weights have diverged, or %s overflows", self.dtype)
        return figures

    def _read(self, note: Callable[[str], None]) -> None:
        """Read this process's clips, and exchange labels with the others; turns the monitor off where that fails."""
        local = self._on_all_ranks("reading the clips to measure", lambda: self._read_local(note))
        if local is None:
            self.enabled = False
            return
        clips, positions, local_labels, total = local
        labels, readable = torch.full((total,), -1), torch.zeros(total, dtype=torch.bool)
        parts = self.world.all_gather_object((positions, local_labels, clips.shape[1:]))
        for part_positions, part_labels, _ in parts:
            labels[part_positions], readable[part_positions] = part_labels, True
        if int(readable.sum()) < MIN_CLIPS:
            self.enabled = False
            if self.world.is_main:
                logger.warning("the features are not measured: only %d of %d clips can be read", readable.sum(), total)
            return
        most = max(len(part_positions) for part_positions, _, _ in parts)
        shape = next(shape for part_positions, _, shape in parts if len(part_positions))
        batches = _equal_batches(clips.view(-1, *shape), most, min(self.batch_size, most))
        self._clips = _Clips(batches, positions, labels, readable)

    def _read_local(self, note: Callable[[str], None]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return this process's readable clips [m, C, T, H, W], their positions and labels [m], and the total count."""
        dataset = self.make_dataset()
        indices = evenly_spaced(len(dataset), self.num_clips)
        loader = make_eval_loader(
            dataset,
            indices=indices.tolist(),
            batch_size=1,  # so that a few clips keep all workers busy
            num_workers=min(self.num_workers, len(indices)),
            world=self.world,
            timeout=self.timeout,
        )
        clips: list[Tensor] = []
        indices_read: list[Tensor] = []
        labels: list[Tensor] = []
        for number, batch in enumerate(loader):
            note(f"reading clip {number + 1} of those whose features are measured")
            for file in batch.bad:
                logger.warning("left out of the feature statistics: %s: %s", file.path, file.reason)
            if len(batch):
                clips.append(batch.clips.clone())  # shared memory, which workers fill, may be small
                indices_read.append(batch.indices)
                labels.append(_class_labels(batch))
        if not clips:
            none = torch.empty(0, dtype=torch.int64)
            return torch.empty(0, dtype=torch.uint8), none, none, len(indices)
        return torch.cat(clips), torch.searchsorted(indices, torch.cat(indices_read)), torch.cat(labels), len(indices)

    @torch.no_grad()
    def _encode(self, encoder: nn.Module, clips: "_Clips", note: Callable[[str], None]) -> TokenMoments:
        """Return the moments of the tokens of this process's clips, at their positions; zeros for those of others."""
        modes = {module: module.training for module in encoder.modules()}
        encoder.eval()
        batches, remaining = [], len(clips.positions)
        try:
            for number, batch in enumerate(clips.batches):
                note(f"measuring features, batch {number + 1} of {len(clips.batches)}")
                batches.append(self._moments(encoder, batch, count=remaining))
                remaining = max(0, remaining - len(batch))
        finally:
            for module, training in modes.items():
                module.training = training
        local = TokenMoments.concatenate(batches)
        table = local.clips.new_zeros(len(clips.labels), local.clips.shape[1])
        table[to_device(clips.positions, table.device)] = local.clips[: len(clips.positions)]
        return dataclasses.replace(local, clips=table)

    def _moments(self, encoder: nn.Module, clips: Tensor, count: int) -> TokenMoments:
        """Reduce a batch, whose first `count` clips are no padding. Its tokens are freed before the next is encoded."""
        device = self.world.device
        video = to_float(to_device(clips, device), self.mean, self.std)
        with autocast(device, self.dtype):
            tokens = encoder(video)
        return TokenMoments.of(tokens, _time_slots(encoder, video, tokens), count)

    def _on_all_ranks(self, what: str, function: Callable[[], Result], must_succeed: bool = False) -> Result | None:
        """Call `function`; if it fails in any process, warn and return None in all.

        Args:
            what: Description for the warning.
            function: Called in every process.
            must_succeed: Raise the error instead.
        """
        result, failed = None, False
        try:
            result = function()
        except Exception:
            if must_succeed:
                raise
            failed = True
            logger.warning("%s failed; training goes on", what, exc_info=True)
        ranks = [rank for rank, rank_failed in enumerate(self.world.all_gather_object(failed)) if rank_failed]
        if ranks and self.world.is_main and not failed:
            logger.warning("%s failed on rank %s; training goes on", what, ", ".join(map(str, ranks)))
        return None if ranks else result


def _time_slots(encoder: nn.Module, video: Tensor, tokens: Tensor) -> int:
    """Return the number of time slots of `tokens`; 1 where the encoder does not say how they are arranged."""
    grid_size: Callable[..., Grid] | None = getattr(encoder, "grid_size", None)
    if grid_size is None:
        return 1
    grid = grid_size(*video.shape[2:])
    return grid.t if grid.num_tokens == tokens.shape[1] else 1


def _class_labels(batch: Batch) -> Tensor:
    """int64 [B], the target `label`; -1 where the samples have no class."""
    labels = batch.targets.get("label")
    if isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.dim() == 1:
        return labels
    return torch.full((len(batch),), -1)


@dataclasses.dataclass(frozen=True)
class _Clips:
    """A process's part of the clips that are measured.

    Attributes:
        batches: uint8 [b, C, T, H, W] each, as from `_equal_batches`.
        positions: int64 [m], positions of this process's clips among all n.
        labels: int64 [n], and readable: bool [n], of all clips.
    """

    batches: Sequence[Tensor]
    positions: Tensor
    labels: Tensor
    readable: Tensor


def _equal_batches(clips: Tensor, count: int, size: int) -> list[Tensor]:
    """Split `clips` into as many batches of `size` as `count` clips need, padded with black clips.

    Thus all processes call a sharded encoder equally often, and a compiled encoder is compiled once.
    """
    batches = list(clips.split(size)) if len(clips) else []
    black = clips.new_zeros(size, *clips.shape[1:])
    if batches and len(batches[-1]) < size:
        batches[-1] = torch.cat([batches[-1], black[len(batches[-1]) :]])
    return batches + [black] * (-(-count // size) - len(batches))
