"""Pictures of the gallery that show clips: masks, features as colors, predicted frames."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from tubelet import hub
from tubelet.config import ConfigError
from tubelet.data import Draw, to_float
from tubelet.data.synthetic import MOTIONS
from tubelet.data.transforms import EvalTransform
from tubelet.probing.encoder import random_encoder
from tubelet.probing.options import PretrainConfig
from tubelet.report import clips, figures
from tubelet.report.run_config import clip_options, read_config

CLIPS = 2
"""Clips of a picture of masks, and of each motion in a picture of features."""
CLIPS_FOR_COMPONENTS = 320
TILE, GAP, LABEL, TITLE, FONT = 48, 3, 116, 30, 22
"""Pixels of a frame, between frames, of the titles on the left and above, and of their letters."""


def masks(folder: Path) -> Image.Image:
    """Draw two clips of a run under its masks, side by side."""
    read = clips.read(folder, _config(folder))
    slots = read.slots()
    columns = {}
    for clip in range(CLIPS):
        frames = read.slot_frames(clip)
        columns[f"clip {clip + 1}"] = np.stack([frames, *(figures.shade(frames, r[clip][slots]) for r in read.roles)])
    return _mosaic(columns, ["frames", *(f"mask {number + 1}" for number in range(len(read.roles)))])


def prediction(folder: Path) -> Image.Image:
    """Return the picture that `app: generation` wrote at the end of a run."""
    path = folder / "prediction.png"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; python -m app.main with `app: generation` writes it")
    return Image.open(path)


def features(folder: Path) -> Image.Image:
    """Draw clips of each motion of the demo beside their pixels and features, the first principal components as colors.

    The components are those of the tokens of `CLIPS_FOR_COMPONENTS` labeled test clips, without the mean over these
    clips at each position.
    """
    config = _config(folder)
    frames, labels = _test_clips(folder, config)
    options = clip_options(config, folder / "config.yaml")
    grid = options.grid
    video = to_float(
        rearrange(torch.from_numpy(frames), "B T H W C -> B C T H W"),
        options.augmentation.normalize_mean,
        options.augmentation.normalize_std,
    )
    data = options.data
    random = random_encoder(
        PretrainConfig(
            checkpoint="random", encoder=config["encoder"], patch_size=data.patch_size, tubelet_size=data.tubelet_size
        ),
        data.crop_size,
        data.num_frames,
    )
    patches = rearrange(frames, "B (t a) (h p) (w q) C -> B t h w (a p q C)", **grid._asdict())
    tokens = {
        "pixels": patches.astype(np.float32),
        "random encoder": _encode(random, video, grid),
        "pretrained encoder": _encode(hub.load_encoder(folder), video, grid),
    }
    colors = {
        name: figures.as_colors(figures.principal_components(values - values.mean(0)))
        for name, values in tokens.items()
    }
    shown = [clip for label in sorted(set(labels)) for clip in np.flatnonzero(labels == label)[:CLIPS]]
    first_of_slot = frames[:, :: frames.shape[1] // grid.t]
    columns = {"frames": first_of_slot, **colors}
    return _mosaic({name: values[shown] for name, values in columns.items()}, [MOTIONS[labels[i]] for i in shown])


def _config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    if config is None:
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml; make demo")
    return config


def _test_clips(folder: Path, config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Read clips of the list of test clips with motions, in equal numbers: uint8 [B, T, H, W, C], labels [B]."""
    lists = folder / "clips" / "motion_test.csv"
    if not lists.is_file():
        raise ConfigError(f"{lists} does not exist; make demo generates the clips")
    with_lists = {**config, "data": {**config["data"], "datasets": [str(lists)], "cache": None}}
    options = clip_options(with_lists, folder / "config.yaml")
    data = options.data.model_copy(update={"random_clip_sampling": False})
    dataset = options.dataset(data, EvalTransform(data.crop_size), on_error="exclude")
    chosen = defaultdict(list)
    for index in range(len(dataset)):
        sample = dataset[Draw(step=0, epoch=0, index=index, position=0)]
        if not sample.excluded:
            chosen[sample.targets["label"]].append(sample.clips[0].numpy())
        if sum(map(len, chosen.values())) == CLIPS_FOR_COMPONENTS:
            break
    labels = np.repeat(list(chosen), [len(of_label) for of_label in chosen.values()])
    frames = np.stack([clip for of_label in chosen.values() for clip in of_label])
    return rearrange(frames, "B C T H W -> B T H W C"), labels


def _encode(encoder: torch.nn.Module, video: torch.Tensor, grid: Any) -> np.ndarray:
    with torch.inference_mode():
        tokens = encoder.eval()(video)
    return rearrange(tokens, "B (t h w) D -> B t h w D", **grid._asdict()).numpy()


def _mosaic(columns: dict[str, np.ndarray], titles: list[str]) -> Image.Image:
    """Draw a row for each clip with its title, and in it the time slots of each column.

    Args:
        columns: Title -> uint8 [rows, t, h, w, 3].
        titles: Titles of the rows; one that repeats is drawn once.
    """
    rows, slots = next(iter(columns.values())).shape[:2]
    step, between = TILE + GAP, 4 * GAP
    width_of_column = slots * step + between
    picture = Image.new("RGBA", (LABEL + len(columns) * width_of_column - between, TITLE + rows * step))
    draw = ImageDraw.Draw(picture)
    for column, (title, clips_of_column) in enumerate(columns.items()):
        left = LABEL + column * width_of_column
        draw.text((left, 2), title, fill=figures.LABEL_COLOR, font_size=FONT)
        for row in range(rows):
            for slot in range(slots):
                tile = Image.fromarray(clips_of_column[row, slot]).resize((TILE, TILE), Image.Resampling.NEAREST)
                picture.paste(tile, (left + slot * step, TITLE + row * step))
    for row, title in enumerate(titles):
        if title not in titles[:row]:
            draw.text((0, TITLE + row * step + TILE // 2), title, fill=figures.LABEL_COLOR, anchor="lm", font_size=FONT)
    return picture
