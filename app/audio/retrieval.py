"""Evaluate retrieval: which sound belongs to a video, and which video to a sound."""

from typing import Any

import torch

from app.audio.data import validation_batches
from app.audio.options import Options
from tubelet.config import UserError
from tubelet.data.sounding_videos import Dataset
from tubelet.data.types import BadFile
from tubelet.objectives.audio_visual import VideoSoundAlignment
from tubelet.objectives.losses.retrieval import retrieval_metrics
from tubelet.runtime.distributed import World, autocast


@torch.no_grad()
def measure_retrieval(
    options: Options, model: VideoSoundAlignment, videos: Dataset, bad: list[BadFile], world: World
) -> dict[str, Any]:
    """Return the metrics of retrieval among the validation videos, and the same with swapped videos.

    Args:
        options: Options of the program.
        model: The trained model.
        videos: The validation videos.
        bad: Files that this process cannot use are appended.
        world: The processes of the run.

    Raises:
        UserError: There are fewer than two videos with sound.
    """
    model.eval()
    embedded = {}
    for batch in validation_batches(options, videos, bad, world):
        with autocast(world.device, options.dtype):
            pairs = zip(*(x.float().cpu() for x in model.embed(batch.to(world.device))), strict=True)
        embedded |= dict(zip(batch.indices.tolist(), pairs, strict=True))
    model.train()
    embedded = {index: pair for part in world.all_gather_object(embedded) for index, pair in part.items()}
    if len(embedded) < 2:
        raise UserError(f"data.dataset_val: {len(embedded)} of its videos can be used; retrieval needs at least two")
    of_videos, of_sounds = (torch.stack(x) for x in zip(*(embedded[index] for index in sorted(embedded)), strict=True))
    numbers = torch.arange(len(of_videos))
    return {
        **retrieval_metrics(of_videos, of_sounds, numbers, name="sound"),
        "swapped_videos": retrieval_metrics(of_videos.roll(1, 0), of_sounds, numbers, name="sound"),
        "num_val": len(of_videos),
    }
