"""Clips of a run's own data as its encoder meets them: frames, masks, features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from tubelet import hub
from tubelet.config import check
from tubelet.config.registry import find
from tubelet.data import AugConfig, DataConfig, Draw, VideoError, to_float
from tubelet.data.transforms import EvalTransform
from tubelet.masks import Grid, token_grid
from tubelet.report import figures

NUMBER = 3
TRIES = 50  # clips looked at until NUMBER of them can be read
MAX_SLOTS = 8  # frames of a filmstrip


@dataclass(frozen=True)
class Clips:
    """B clips as frames, uint8 [B, T, H, W, 3], and for each mask of the configuration the roles of their tokens."""

    frames: np.ndarray
    roles: tuple[np.ndarray, ...]
    grid: Grid

    def slots(self) -> np.ndarray:
        """The time slots that are shown, evenly over the clip."""
        return np.unique(np.linspace(0, self.grid.t - 1, min(self.grid.t, MAX_SLOTS)).round().astype(int))

    def shown(self, clip: int) -> np.ndarray:
        """The first frame of each time slot that is shown."""
        tubelet_size = len(self.frames[clip]) // self.grid.t
        return self.frames[clip][self.slots() * tubelet_size]


def read(folder: Path, config: dict[str, Any]) -> Clips:
    """Clips of the data that `config`, a pretraining's resolved YAML, names.

    Raises VideoError when none can be read, ConfigError when the data are gone.
    """
    data = check(config["data"], DataConfig, folder / "config.yaml")
    frames = _read_frames(data)
    grid = token_grid(data.crop_size, data.num_frames, data.patch_size, data.tubelet_size)
    return Clips(frames, _roles(config["mask"], data, grid, len(frames)), grid)


def read_features(folder: Path, config: dict[str, Any]) -> tuple[Clips, np.ndarray]:
    """Clips as from `read`, and the features [B, t, h, w, D] that the run's target encoder has of them.

    Raises CheckpointError when the run has no good checkpoint, and what `read` raises.
    """
    clips = read(folder, config)
    augmentation = check(config["data_aug"], AugConfig, folder / "config.yaml")
    encoder = hub.load_encoder(folder).eval()
    video = rearrange(torch.from_numpy(clips.frames), "B T H W C -> B C T H W")
    video = to_float(video, augmentation.normalize_mean, augmentation.normalize_std)
    with torch.inference_mode():
        tokens = encoder(video if video.shape[2] > 1 else video[:, :, 0])
    return clips, rearrange(tokens, "B (t h w) D -> B t h w D", **clips.grid._asdict()).numpy()


def draw_masks(clips: Clips) -> Image.Image:
    """A filmstrip of each clip: its frames, and below them what each mask shows and hides."""
    strips = []
    for clip, slots in ((b, clips.slots()) for b in range(len(clips.frames))):
        frames = clips.shown(clip)
        rows = {f"clip {clip + 1}": frames}
        for number, roles in enumerate(clips.roles, start=1):
            rows[f"mask {number}"] = figures.shade(frames, roles[clip][slots])
        strips.append(figures.filmstrip(rows))
    return figures.stack(strips, gap=18)


def draw_features(clips: Clips, features: np.ndarray) -> Image.Image:
    """A filmstrip of each clip with the features' first three principal components as red, green and blue below."""
    colours = figures.as_colours(figures.principal_components(features))
    strips = []
    for clip, slots in ((b, clips.slots()) for b in range(len(clips.frames))):
        frames = clips.shown(clip)
        rows = {
            f"clip {clip + 1}": frames,
            "components, over the frames": figures.over_frames(colours[clip][slots], frames),
            "components, as they are": colours[clip][slots],
        }
        strips.append(figures.filmstrip(rows))
    return figures.stack(strips, gap=18)


def _read_frames(data: DataConfig) -> np.ndarray:
    """uint8 [NUMBER, T, H, W, C]: the first clips, of an order that is always the same, that can be read."""
    middle = data.model_copy(update={"random_clip_sampling": False, "num_clips": 1, "cache": None})
    dataset = find("data", data.dataset_type).Dataset(middle, EvalTransform(data.crop_size), on_error="exclude")
    order = np.random.default_rng(0).permutation(len(dataset))[:TRIES]
    samples = []
    for index in order:
        if not (sample := dataset[Draw(step=0, epoch=0, index=int(index), slot=0)]).excluded:
            samples.append(sample)
        if len(samples) == NUMBER:
            break
    if not samples:
        raise VideoError(data.datasets[0], f"none of the first {len(order)} clips can be read")
    return rearrange(torch.cat([sample.clips for sample in samples]), "B C T H W -> B T H W C").numpy()


def _roles(masks: list, data: DataConfig, grid: Grid, number: int) -> tuple[np.ndarray, ...]:
    collator = find("masks", data.mask_type).MaskCollator(
        cfgs_mask=masks,
        crop_size=data.crop_size,
        num_frames=data.num_frames,
        patch_size=data.patch_size,
        tubelet_size=data.tubelet_size,
    )
    contexts, targets = collator.sample_masks(number, np.random.default_rng(0))
    return tuple(
        np.stack([figures.token_roles(c, t, grid) for c, t in zip(context.numpy(), target.numpy(), strict=True)])
        for context, target in zip(contexts, targets, strict=True)
    )
