"""Features of videos under a frozen encoder, extracted once and kept in memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tubelet.data.loader import make_eval_loader
from tubelet.data.types import BadFile
from tubelet.data.video_dataset import Dataset
from tubelet.probing.cache import FeatureCache
from tubelet.runtime.distributed import World
from tubelet.runtime.progress import progress

_VIDEOS_AT_ONCE = 512  # of a file of the cache, which is what an interrupted extraction can lose


def extract_tokens(
    encode: Callable[[Tensor], Tensor],
    dataset: Dataset,
    folder: Path,
    key: str,
    world: World,
    *,
    batch_size: int,
    num_workers: int,
    timeout: int,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tokens [N, D] of each video, and the reason for each one that cannot be read.

    Tokens that are in the cache are not computed. Each process computes a part of the others.

    Args:
        encode: Maps clips uint8 [B, C, T, H, W] on the device to tokens [B, N, D].
        dataset: The videos, without augmentation, with `on_error="exclude"`.
        folder: Folder of the cache.
        key: Everything that the tokens depend on except the video.
        world: The processes.
        batch_size: Videos of a forward pass.
        num_workers: Worker processes that read videos.
        timeout: Seconds without a batch from a worker after which its video counts as unreadable.
    """
    cache = FeatureCache(folder, key)
    missing = [index for index, path in enumerate(dataset.paths) if path not in cache]
    loader = make_eval_loader(
        dataset,
        indices=missing,
        batch_size=batch_size,
        num_workers=num_workers,
        world=world,
        timeout=timeout,
    )
    bad: list[BadFile] = []
    paths: list[str] = []
    tokens: list[Tensor] = []
    bar = progress(desc="features", total=len(missing), unit="video", off=not missing or not world.is_main)
    for batch in loader:
        bad += batch.bad
        if len(batch):
            paths += [dataset.paths[index] for index in batch.indices.tolist()]
            tokens.append(encode(batch.clips.to(world.device)).cpu())
        if len(paths) >= _VIDEOS_AT_ONCE:
            cache.add(paths, torch.cat(tokens)[:, None, None])
            paths, tokens = [], []
        bar.update(len(batch) * world.world_size)
    bar.close()
    if paths:
        cache.add(paths, torch.cat(tokens)[:, None, None])
    excluded = {file.path: file.reason for part in world.all_gather_object(bad) for file in part}
    cache = FeatureCache(folder, key)  # with what the other processes have added
    readable: Sequence[str] = [path for path in dataset.paths if path in cache]
    stored = cache.open(readable).load()[:, 0, 0] if readable else torch.empty(0)
    return dict(zip(readable, stored, strict=True)), excluded
