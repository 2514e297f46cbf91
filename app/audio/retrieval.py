"""Evaluate retrieval: which sound belongs to a video, and which video to a sound."""

from typing import Any

import torch
from torch import Tensor

from app.audio.data import validation_batches
from app.audio.options import Options
from tubelet.config import UserError
from tubelet.data import Batch
from tubelet.data.sounding_videos import Dataset
from tubelet.objectives.audio_visual import VideoSoundAlignment
from tubelet.objectives.losses.retrieval import retrieval_metrics
from tubelet.probing.map_samples import map_samples
from tubelet.runtime.watchdog import Watchdog


def measure_retrieval(
    options: Options, model: VideoSoundAlignment, videos: Dataset, watchdog: Watchdog
) -> tuple[dict[str, Any], dict[str, str]]:
    """Rank the sounds for each validation video and the videos for each sound.

    Returns:
        The metrics, and the same with swapped videos; and the reason for each file that cannot be used.

    Raises:
        UserError: There are fewer than two videos with sound.
    """

    def embed(batch: Batch) -> list[tuple[Tensor, Tensor]]:
        of_videos, of_sounds = (x.float().cpu() for x in model.embed(batch))
        return list(zip(of_videos, of_sounds, strict=True))

    batches = validation_batches(options, videos, watchdog.world)
    embedded, excluded = map_samples(embed, model, batches, options.dtype_on(watchdog.world.device), watchdog)
    if len(embedded) < 2:
        raise UserError(f"data.dataset_val: {len(embedded)} of its videos can be used; retrieval needs at least two")
    of_videos, of_sounds = (torch.stack(x) for x in zip(*(embedded[index] for index in sorted(embedded)), strict=True))
    numbers = torch.arange(len(of_videos))
    measured = {
        **retrieval_metrics(of_videos, of_sounds, numbers, name="sound"),
        "swapped_videos": retrieval_metrics(of_videos.roll(1, 0), of_sounds, numbers, name="sound"),
        "num_val": len(of_videos),
    }
    return measured, excluded
