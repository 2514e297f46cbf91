"""Loading of random clips from packed shards, compared with the files they were made from.

The files are H.264 with x264's default distance of key frames, 250. Both sides read 16 of 64 frames with Tubelet's
loader and augment them. Shards "at a quarter of the rate" have every fourth frame, of which a clip takes 16 in a row.

    python -m benchmarks packed
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from app.pack.options import Options
from app.pack.train import main as pack
from benchmarks.harness import Row, time_alternately
from benchmarks.loader import BATCH_SIZE, FRAME_STEP, NUM_FRAMES, seconds_after_first, write_video
from tubelet.config import check
from tubelet.config.registry import find
from tubelet.data import AugConfig, DataConfig
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import TrainTransform
from tubelet.runtime.distributed import World

RATE = 30
# Width and height of the files; short side of the clips; crop; and whether the goal is set for it.
CASES = (((1280, 720), 256, 224, True), ((340, 256), 256, 224, False), ((340, 256), 128, 112, True))


def run(repeats: int = 5, num_videos: int = 4, passes: int = 20, num_workers: int | None = None) -> list[Row]:
    """Compare loading from shards and from the original files.

    Args:
        repeats: Timed runs of each side.
        num_videos: Number of generated videos of each size.
        passes: Passes over the videos in each run.
        num_workers: Worker processes; if None, one for each core available to this process, at most two.
    """
    workers = min(2, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for (width, height), short_side, crop, has_goal in CASES:
            originals = Path(name) / f"{height}p"
            if not originals.exists():
                originals.mkdir()
                for seed in range(num_videos):
                    write_video(originals / f"{seed}.mp4", seed, width=width, height=height)
            for step, title in ((1, "all frames"), (FRAME_STEP, "a quarter of the rate")):
                folder = Path(name) / f"{height}p-{short_side}-{step}"
                encoding = {"short_side": short_side, "fps": RATE / step if step > 1 else None}
                raw = {
                    "app": "pack",
                    "folder": str(folder),
                    "data": {"datasets": [str(originals)]},
                    "encoding": encoding,
                }
                pack(check(raw, Options, "benchmark"), World())
                timing = time_alternately(
                    lambda: batches(folder, "webdataset", crop, FRAME_STEP // step, workers, passes),  # noqa: B023
                    lambda: batches(originals, "video_dataset", crop, FRAME_STEP, workers, passes),  # noqa: B023
                    repeats,
                    seconds_after_first,
                )
                clips = passes * num_videos - BATCH_SIZE
                table = pq.read_table(folder / "clips.parquet")
                size = sum(table["size"].to_pylist()) / sum(path.stat().st_size for path in originals.iterdir())
                psnr = sum(table["psnr"].to_pylist()) / len(table)
                rows.append(
                    Row(
                        f"packed {width}x{height} to {short_side} px, {title}, crop {crop}: {size:.2f}x the bytes, "
                        f"{psnr:.1f} dB",
                        f"{clips / timing.ours:.1f} clips/s",
                        f"{clips / timing.peer:.1f} clips/s",
                        timing.ratio,
                        goal=5 if has_goal else None,
                    )
                )
    return rows


def batches(source: str | Path, kind: str, crop: int, step: int, num_workers: int, passes: int) -> Iterator[Any]:
    """Yield the batches of so many passes over the videos of a folder."""
    raw = {
        "datasets": [str(source)],
        "format": kind,
        "num_frames": NUM_FRAMES,
        "sampling_rate": step,
        "crop_size": crop,
    }
    dataset = find("data", kind).Dataset(check(raw, DataConfig, "benchmark"), TrainTransform(AugConfig(), crop))
    stream = SampleStream(dataset.sizes, None, BATCH_SIZE, seed=0)
    steps = passes * len(dataset) // BATCH_SIZE
    yield from make_train_loader(dataset, stream, None, seed=0, first_step=0, last_step=steps, num_workers=num_workers)
