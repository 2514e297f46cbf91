"""The videos of a run as data sets, and their features under a frozen encoder."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from app.language.data import Record
from app.language.options import DataConfig as TextDataConfig
from app.language.options import Options
from tubelet.config import ConfigError, check
from tubelet.data import Batch, DataConfig, Draw, to_float
from tubelet.data.loader import make_eval_loader
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.language.dataset import TextSample, TextVideos, VideoFiles
from tubelet.language.features import extract_tokens
from tubelet.language.tokenizer import TextEncoder
from tubelet.objectives.video_to_text import VideoEncoding
from tubelet.probing.clips import clip_options
from tubelet.probing.encoder import fingerprint
from tubelet.probing.map_samples import map_samples
from tubelet.runtime.distributed import World
from tubelet.runtime.precision import autocast
from tubelet.runtime.watchdog import Watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """The tokens of each video by path, None where clips are encoded anew each time, and why videos are left out."""

    tokens: Mapping[str, Tensor] | None
    excluded: dict[str, str]

    def readable(self, records: Sequence[Record]) -> list[Record]:
        """Return the records whose videos are not left out."""
        return [record for record in records if record.path not in self.excluded]


def training_videos(
    options: Options, samples: Sequence[TextSample], text: TextEncoder, features: Features
) -> TextVideos:
    """Return the training samples.

    Raises:
        ConfigError: None of their videos can be read, or retrieval has one text for all of them.
    """
    samples = [sample for sample in samples if sample.path not in features.excluded]
    if not samples:
        raise ConfigError(f"data.dataset_train: none of the videos can be read: {features.excluded}")
    augmentation, resolution = options.data_aug, options.optimization.resolution
    transform = EvalTransform(resolution) if augmentation is None else TrainTransform(augmentation, resolution)
    clips = _clips(options, random=augmentation is not None)
    seed = options.meta.seed
    together = options.data.texts_per_video
    videos = TextVideos(
        clips, transform, samples, text, features.tokens, texts_per_video=together, seed=seed, on_error="replace"
    )
    if options.task == "retrieval" and videos.num_different_texts < 2:
        raise ConfigError(
            f"data.dataset_train: all texts are equal in their first {options.text.max_target} tokens "
            "(text.max_target), so retrieval has nothing to tell apart"
        )
    return videos


def read_features(options: Options, model: VideoEncoding, records: Sequence[Record], world: World) -> Features:
    """Extract the features of the records' videos with `data.cache_features`; each process gets all of them."""
    where = options.data.cache_features
    if not where:
        return Features(None, {})
    paths = list(dict.fromkeys(record.path for record in records))
    files = VideoFiles(_clips(options), EvalTransform(options.optimization.resolution), paths, on_error="exclude")
    how = _clips(options).model_dump(exclude={"datasets", "cache", "num_workers"})

    dtype = options.dtype_on(world.device)

    @torch.no_grad()
    def encode(clips: Tensor) -> Tensor:
        with autocast(world.device, dtype):
            return model.encoder(to_float(clips, model.mean, model.std)).float()

    tokens, excluded = extract_tokens(
        encode,
        files,
        Path(options.folder) / "features" if where is True else Path(where),
        f"{fingerprint(model.encoder)} {dtype} {model.mean} {model.std} {how}",
        world,
        batch_size=options.evaluation.batch_size,
        num_workers=options.data.num_workers,
        timeout=options.data.worker_timeout,
    )
    return Features(tokens, excluded)


def loading(options: Options, features: Features) -> TextDataConfig:
    """Return section `data` as it is used to load samples: features from memory need no worker processes."""
    return options.data if features.tokens is None else options.data.model_copy(update={"num_workers": 0})


@dataclass(frozen=True)
class Run:
    """What all evaluations of a run have in common."""

    options: Options
    text: TextEncoder
    features: Features
    world: World
    watchdog: Watchdog


def map_records(
    compute: Callable[[Batch], Sequence[T]], model: VideoEncoding, records: Sequence[Record], run: Run
) -> tuple[dict[int, T], dict[str, str]]:
    """Return the result of each record and the reason for each unreadable video; see `map_samples`."""
    options, tokens = run.options, run.features.tokens
    samples = [TextSample(record.path, record.prompt, record.references[0]) for record in records]
    transform = EvalTransform(options.optimization.resolution)
    batches = make_eval_loader(
        TextVideos(_clips(options), transform, samples, run.text, tokens, on_error="exclude"),
        batch_size=options.evaluation.batch_size,
        world=run.world,
        num_workers=loading(options, run.features).num_workers,
        timeout=options.data.worker_timeout,
    )
    return map_samples(compute, model, batches, options.dtype_on(run.world.device), run.watchdog)


def picture(options: Options, path: str) -> str:
    """Return the clip of a video as a data address of a small animated GIF."""
    files = VideoFiles(_clips(options), EvalTransform(options.optimization.resolution), [path])
    clip = files[Draw(0, 0, 0, 0)].clips[0].permute(1, 2, 3, 0).numpy()
    frames = [Image.fromarray(frame) for frame in clip]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=150, loop=0)
    return "data:image/gif;base64," + base64.b64encode(content.getvalue()).decode()


def _clips(options: Options, *, random: bool = False) -> DataConfig:
    data = options.data
    raw = clip_options(data, [data.videos], num_clips=1, resolution=options.optimization.resolution, random=random)
    return check(raw | {"num_workers": data.num_workers}, DataConfig, "data")
