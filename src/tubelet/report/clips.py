"""Clips of a run's data as its encoder sees them: frames, masks, features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from tubelet import hub
from tubelet.data import Draw, VideoError, to_float
from tubelet.data.transforms import EvalTransform
from tubelet.grid import Grid
from tubelet.report import figures
from tubelet.report.run_config import ClipOptions, clip_options

NUM_CLIPS = 3
MAX_TRIES = 50  # clips that are tried until NUM_CLIPS can be read
MAX_SLOTS = 8  # frames of a filmstrip


@dataclass(frozen=True)
class Clips:
    """B clips.

    Args:
        frames: uint8 [B, T, H, W, 3].
        roles: For each mask of the configuration the roles of the tokens [B, t, h, w], see `figures.token_roles`.
        grid: Token grid of a clip.
    """

    frames: np.ndarray
    roles: tuple[np.ndarray, ...]
    grid: Grid

    def slots(self) -> np.ndarray:
        """Return the time slots that are drawn, evenly spaced over the clip."""
        return np.unique(np.linspace(0, self.grid.t - 1, min(self.grid.t, MAX_SLOTS)).round().astype(int))

    def slot_frames(self, clip: int) -> np.ndarray:
        """Return the first frame of each time slot that is drawn, uint8 [slots, H, W, 3]."""
        tubelet_size = len(self.frames[clip]) // self.grid.t
        return self.frames[clip][self.slots() * tubelet_size]


def read(folder: Path, config: dict[str, Any]) -> Clips:
    """Read clips of the data of a run, and draw masks for them.

    Args:
        folder: Run folder.
        config: Its configuration, see `run_config.read_config`.

    Raises:
        VideoError: No clip can be read.
        ConfigError: The data do not exist any more, or an option is invalid.
    """
    options = clip_options(config, folder / "config.yaml")
    frames = _read_frames(options)
    return Clips(frames, _token_roles(options, len(frames)), options.grid)


def read_features(folder: Path, config: dict[str, Any]) -> tuple[Clips, np.ndarray]:
    """Read clips as `read` does, and encode them with the encoder that `hub.load_encoder` finds in the folder.

    Returns:
        The clips and their features [B, t, h, w, D].

    Raises:
        CheckpointError: The run has no checkpoint of an encoder.
        VideoError, ConfigError: See `read`.
    """
    clips = read(folder, config)
    augmentation = clip_options(config, folder / "config.yaml").augmentation
    encoder = hub.load_encoder(folder).eval()
    video = rearrange(torch.from_numpy(clips.frames), "B T H W C -> B C T H W")
    video = to_float(video, augmentation.normalize_mean, augmentation.normalize_std)
    with torch.inference_mode():
        tokens = encoder(video if video.shape[2] > 1 else video[:, :, 0])
    return clips, rearrange(tokens, "B (t h w) D -> B t h w D", **clips.grid._asdict()).numpy()


def draw_masks(clips: Clips) -> Image.Image:
    """Draw a filmstrip of each clip: its frames, and below them the frames under each mask."""
    strips = []
    slots = clips.slots()
    for clip in range(len(clips.frames)):
        frames = clips.slot_frames(clip)
        rows = {f"clip {clip + 1}": frames}
        for number, roles in enumerate(clips.roles, start=1):
            rows[f"mask {number}"] = figures.shade(frames, roles[clip][slots])
        strips.append(figures.filmstrip(rows))
    return figures.stack(strips, gap=18)


def draw_features(clips: Clips, features: np.ndarray) -> Image.Image:
    """Draw a filmstrip of each clip, and below it the first three principal components of its features as colors.

    Args:
        clips: B clips.
        features: Their features [B, t, h, w, D].
    """
    colors = figures.as_colors(figures.principal_components(features))
    strips = []
    slots = clips.slots()
    for clip in range(len(clips.frames)):
        frames = clips.slot_frames(clip)
        rows = {
            f"clip {clip + 1}": frames,
            "components, and frames": figures.overlay(colors[clip][slots], frames),
            "components": colors[clip][slots],
        }
        strips.append(figures.filmstrip(rows))
    return figures.stack(strips, gap=18)


def _read_frames(options: ClipOptions) -> np.ndarray:
    """Read the first clips that can be read, in a fixed random order: uint8 [NUM_CLIPS, T, H, W, C]."""
    data = options.data.model_copy(update={"random_clip_sampling": False, "num_clips": 1, "cache": None})
    dataset = options.dataset(data, EvalTransform(data.crop_size), on_error="exclude")
    order = np.random.default_rng(0).permutation(len(dataset))[:MAX_TRIES]
    samples = []
    for index in order:
        if not (sample := dataset[Draw(step=0, epoch=0, index=int(index), position=0)]).excluded:
            samples.append(sample)
        if len(samples) == NUM_CLIPS:
            break
    if not samples:
        raise VideoError(data.datasets[0], f"none of the first {len(order)} clips can be read")
    return rearrange(torch.cat([sample.clips for sample in samples]), "B C T H W -> B T H W C").numpy()


def _token_roles(options: ClipOptions, batch_size: int) -> tuple[np.ndarray, ...]:
    """Draw each mask for `batch_size` clips: roles [B, t, h, w]."""
    if options.masks is None:
        return ()
    contexts, targets = options.masks.sample_masks(batch_size, np.random.default_rng(0))
    roles = []
    for context, target in zip(contexts, targets, strict=True):
        pairs = zip(context.numpy(), target.numpy(), strict=True)
        roles.append(np.stack([figures.token_roles(*pair, options.grid) for pair in pairs]))
    return tuple(roles)
