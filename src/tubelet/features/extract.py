"""Features of all clips of a video collection, part by part."""

import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tubelet
from tubelet.config import ConfigError, dump
from tubelet.config.addresses import public
from tubelet.features import store
from tubelet.features.options import FeaturesOptions, Kind
from tubelet.features.reading import ClipReader, Segment
from tubelet.features.store import Row
from tubelet.probing.encoder import FrozenEncoder, load_frozen, with_normalization
from tubelet.probing.features import reduce
from tubelet.runtime.distributed import World
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.precision import warn_if_emulated
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.runtime.transfer import to_device
from tubelet.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

BAD = "bad_files.txt"
PARTS_AT_ONCE = 8
"""Parts that the workers of one loader read."""
POLL_SECONDS = 0.2


def run(options: FeaturesOptions, world: World) -> None:
    """Write the parts that the folder of `options` misses, then `results.json` and `bad_files.txt`.

    A part belongs to one process and depends on its videos and the options only. So the store does not depend on the
    number of processes, nor on where an earlier call was stopped.

    Raises:
        ConfigError: The folder has features of another encoder, of other videos or of other options.
    """
    options = world.broadcast_from_rank0(lambda: with_normalization(options))
    reader = ClipReader(options.data)
    with Watchdog(world, options.distributed.timeout) as watchdog:
        encoder = load_frozen(
            options.pretrain, options.data, options.data.resolution, world, bfloat16=options.use_bfloat16
        )
        warn_if_emulated(encoder.dtype, world.device, "use_bfloat16=false")
        description, missing = world.broadcast_from_rank0(lambda: _prepare(options, reader, encoder))
        Extraction(options, reader, encoder, watchdog, description).run(missing)


def _prepare(options: FeaturesOptions, reader: ClipReader, encoder: FrozenEncoder) -> tuple[dict[str, Any], list[int]]:
    """Check and begin the store of the folder; return its description and the parts that it misses."""
    folder = Path(options.folder)
    check_same_configuration(folder, options)
    folder.mkdir(parents=True, exist_ok=True)
    description = describe(options, reader, encoder)
    store.begin(folder, description)
    write_atomic(folder / "config.yaml", dump(options))
    return description, store.missing_parts(folder, parts_of_shard(options, reader))


def parts_of_shard(options: FeaturesOptions, reader: ClipReader) -> range:
    return range(options.shard.index, _num_parts(options, reader), options.shard.count)


def _num_parts(options: FeaturesOptions, reader: ClipReader) -> int:
    return -(-len(reader.dataset) // options.videos_per_part)


def describe(options: FeaturesOptions, reader: ClipReader, encoder: FrozenEncoder) -> dict[str, Any]:
    """Everything that the features depend on, as JSON types; the metadata of each file."""
    o, data = options, options.data
    grid = encoder.module.grid_size(data.frames_per_clip, data.resolution, data.resolution)
    videos = hashlib.sha256()
    for path, label in zip(reader.dataset.paths, reader.dataset.labels, strict=True):
        videos.update(f"{path}\t{label}\n".encode(errors="surrogateescape"))
    clips = data.model_dump(
        mode="json", exclude={"datasets", "num_workers", "worker_timeout", "cache", "normalize_mean", "normalize_std"}
    )
    return {
        "tubelet": tubelet.__version__,
        "encoder": encoder.fingerprint,
        "pretrain": o.pretrain.model_dump(mode="json"),
        "clips": {**clips, "normalize_mean": list(encoder.mean), "normalize_std": list(encoder.std)},
        "features": o.features,
        "grid": list(grid),
        "embed_dim": encoder.module.embed_dim,
        "dtype": o.dtype,
        "use_bfloat16": o.use_bfloat16,
        "batch_size": o.batch_size,
        "videos_hash": videos.hexdigest(),
        "num_videos": len(reader.dataset),
        "videos_per_part": o.videos_per_part,
        "num_parts": _num_parts(options, reader),
        "classes": list(reader.dataset.classes),
    }


class Extraction:
    """The share of one process."""

    def __init__(
        self,
        options: FeaturesOptions,
        reader: ClipReader,
        encoder: FrozenEncoder,
        watchdog: Watchdog,
        description: dict[str, Any],
    ):
        self.options, self.reader, self.encoder, self.description = options, reader, encoder, description
        self.watchdog, self.world = watchdog, watchdog.world
        self.folder = Path(options.folder)
        self.parts = parts_of_shard(options, reader)
        self.grid = encoder.module.grid_size(
            options.data.frames_per_clip, options.data.resolution, options.data.resolution
        )
        self._dtype = getattr(torch, options.dtype)

    def run(self, missing: list[int]) -> None:
        """Write this process's share of the parts `missing`; rank 0 waits for the others and writes the summary."""
        world = self.world
        mine = missing[world.rank :: world.world_size]
        total, left = (sum(len(self._videos(part)) for part in parts) for parts in (self.parts, missing))
        with progress(desc="features", total=total, initial=total - left, unit="video", off=not world.is_main) as bar:
            for first in range(0, len(mine), PARTS_AT_ONCE):
                self._write_parts(mine[first : first + PARTS_AT_ONCE], bar)
            if not world.is_main:
                return
            while unfinished := store.missing_parts(self.folder, missing):
                self.watchdog.note(f"waiting for {len(unfinished)} parts of others, {time.monotonic():.0f} s")
                bar.update(total - sum(len(self._videos(part)) for part in unfinished) - bar.n)
                time.sleep(POLL_SECONDS)
            bar.update(total - bar.n)
        self._write_summary()

    def _videos(self, part: int) -> range:
        size = self.options.videos_per_part
        return range(part * size, min((part + 1) * size, len(self.reader.dataset)))

    def _write_parts(self, parts: list[int], bar: tqdm) -> None:
        """Write parts that follow each other in one pass of the workers; `bar` advances by this process's videos."""
        videos = [video for part in parts for video in self._videos(part)]
        bad: dict[int, str] = {}
        counts: dict[int, int] = {}
        for video, count in zip(videos, self.reader.num_clips(videos), strict=True):
            self.watchdog.note(f"opening video {video}")
            if isinstance(count, str):
                bad[video] = count
            else:
                counts[video] = count
        segments = iter(self.reader.segments(list(counts.items())))
        for part in parts:
            remaining = {video: counts[video] for video in self._videos(part) if video in counts}
            bar.update(len(self._videos(part)) - len(remaining))
            self._write_part(part, self._read(segments, remaining, bar), bad)

    def _read(self, segments: Iterator[Segment], remaining: dict[int, int], bar: tqdm) -> Iterator[Segment]:
        """Yield the next segments, until all clips of the videos in `remaining` have come."""
        while remaining:
            segment = next(segments)
            self.watchdog.note(f"video {segment.video}, clips {segment.first} to {segment.stop - 1}")
            yield segment
            if remaining[segment.video] == segment.stop:
                del remaining[segment.video]
                bar.update(1)

    def _write_part(self, part: int, segments: Iterator[Segment], bad: dict[int, str]) -> None:
        """Encode the clips of the videos of a part, and write them; videos that cannot be read are added to `bad`."""
        rows: list[tuple[int, Row]] = []
        features: dict[Kind, list[Tensor]] = {kind: [self._no_features(kind)] for kind in self.options.features}
        clips: list[Tensor] = []
        for segment in segments:
            if segment.error is not None:
                bad.setdefault(segment.video, segment.error)
                continue
            rows += [(segment.video, row) for row in self._rows(segment)]
            clips += segment.clips.unbind()
            while len(clips) >= self.options.batch_size:
                self._encode(clips[: self.options.batch_size], features)
                del clips[: self.options.batch_size]
        if clips:
            self._encode(clips, features)
        # A video that breaks off has no rows at all.
        kept = [i for i, (video, _) in enumerate(rows) if video not in bad]
        tensors = {kind: torch.cat(batches[1:] if rows else batches)[kept] for kind, batches in features.items()}
        paths = self.reader.dataset.paths
        unreadable = {public(paths[video]): bad[video] for video in self._videos(part) if video in bad}
        store.write_part(self.folder, part, [rows[i][1] for i in kept], tensors, unreadable, self.description)

    def _rows(self, segment: Segment) -> Iterator[Row]:
        path, label = public(self.reader.dataset.paths[segment.video]), self.reader.dataset.labels[segment.video]
        for i, clip in enumerate(range(segment.first, segment.stop)):
            start, end = (None, None) if segment.times is None else segment.times[i].tolist()
            yield Row(path, label, clip, start, end)

    def _encode(self, clips: list[Tensor], features: dict[Kind, list[Tensor]]) -> None:
        """Add the features of a batch of clips uint8 [3, T, H, W]."""
        tokens = self.encoder(to_device(torch.stack(clips), self.encoder.device)[:, None])[:, 0]
        name = type(self.encoder.module).__name__
        for kind, batches in features.items():
            reduced = reduce(tokens, kind, self.grid, name)
            if kind == "mean":
                reduced = reduced[:, 0]
            stored = reduced.to(self._dtype).cpu()  # the only read of the batch
            if not stored.isfinite().all():
                if reduced.isfinite().all():
                    raise ConfigError(f"dtype: features exceed the range of {self.options.dtype}; set dtype: float32")
                raise ConfigError("pretrain: the encoder returns features that are not finite; choose a checkpoint")
            batches.append(stored)

    def _no_features(self, kind: Kind) -> Tensor:
        """Features [0, …], for a part none of whose videos can be read."""
        dim = self.encoder.module.embed_dim
        shapes = {"mean": (0, dim), "slots": (0, self.grid.t, dim), "tokens": (0, self.grid.num_tokens, dim)}
        return torch.empty(shapes[kind], dtype=self._dtype)

    def _write_summary(self) -> None:
        """Write `results.json` and `bad_files.txt` from the parts of this folder."""
        unreadable = store.unreadable(self.folder, self.parts)
        lines = "".join(f"{path}\t{' '.join(reason.split())}\n" for path, reason in unreadable.items())
        if unreadable:
            logger.warning("%d unreadable videos have no features; %s lists them", len(unreadable), self.folder / BAD)
            write_atomic(self.folder / BAD, lines)
        videos = sum(len(self._videos(part)) for part in self.parts)
        write_json(
            self.folder / "results.json",
            {
                "videos": videos - len(unreadable),
                "clips": store.num_rows(self.folder, self.parts),
                "unreadable": len(unreadable),
                "encoder": self.encoder.fingerprint,
            },
        )
