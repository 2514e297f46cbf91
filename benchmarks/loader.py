"""Loading of augmented and normalized clips from video files, compared with a pipeline like that of V-JEPA.

Both sides read 16 frames with a step of 4, apply a random resized crop to 224 px, flip and normalize, with the same
number of worker processes. The peer decodes with decord, converts full frames to float32 first and sends float32 clips
from its workers. Tubelet decodes with PyAV, skipping B-frames that are not needed, and normalizes in the main process
(on a GPU machine the GPU does this). A second row compares decoding alone.

    python -m benchmarks loader
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import Row, seconds, time_alternately
from tubelet.data import AugConfig, DataConfig, Decoder, to_float
from tubelet.data.decoders import open_video
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import TrainTransform
from tubelet.data.video_dataset import Dataset

NUM_FRAMES, FRAME_STEP, CROP_SIZE, BATCH_SIZE = 16, 4, 224, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(repeats: int = 7, num_videos: int = 24, passes: int = 3, num_workers: int | None = None) -> list[Row]:
    """Compare loading and decoding.

    Args:
        repeats: Timed runs of each side.
        num_videos: Number of generated videos.
        passes: Passes over the videos in each run.
        num_workers: Worker processes; if None, one for each core available to this process, at most two.
    """
    workers = min(2, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_video(Path(folder) / f"{i}.mp4", seed=i) for i in range(num_videos)]
        loading = time_alternately(
            lambda: our_batches(paths * passes, workers),
            lambda: peer_batches(paths * passes, workers),
            repeats,
            seconds_after_first,
        )
        decoding = time_alternately(lambda: decode(paths, "pyav"), lambda: decode(paths, "decord"), repeats)
    clips = passes * num_videos - BATCH_SIZE
    return [
        Row(
            f"loader, {NUM_FRAMES} frames of 340x256 mp4 to {CROP_SIZE} px, {workers} worker(s)",
            f"{clips / loading.ours:.1f} clips/s",
            f"{clips / loading.peer:.1f} clips/s",
            loading.ratio,
            goal=1.5,
        ),
        Row(
            f"decoding only, PyAV against decord, {NUM_FRAMES} frames of 340x256 mp4",
            f"{num_videos / decoding.ours:.1f} clips/s",
            f"{num_videos / decoding.peer:.1f} clips/s",
            decoding.ratio,
        ),
    ]


def decode(paths: list[str], decoder: Decoder) -> None:
    """Decode one clip of each video, with the same random start frames in every call."""
    starts = np.random.default_rng(0).integers(0, 300 - NUM_FRAMES * FRAME_STEP, len(paths))
    for path, start in zip(paths, starts, strict=True):
        open_video(path, decoder).frames_at(start + FRAME_STEP * np.arange(NUM_FRAMES))


def seconds_after_first(start: Callable[[], Iterator[Tensor]]) -> float:
    """Time all batches except the first, which includes the start of the workers.

    Every call starts new workers, so that none prefetches while the other side is timed.
    """
    batches = start()
    next(batches)

    def consume() -> None:
        for _ in batches:
            pass

    return seconds(consume)


def our_batches(paths: list[str], num_workers: int) -> Iterator[Tensor]:
    """Yield normalized clips [B, C, T, H, W] of one pass of Tubelet's loader."""
    data = DataConfig(
        datasets=paths,
        batch_size=BATCH_SIZE,
        num_frames=NUM_FRAMES,
        sampling_rate=FRAME_STEP,
        crop_size=CROP_SIZE,
    )
    dataset = Dataset(data, TrainTransform(AugConfig(), CROP_SIZE))
    stream = SampleStream(dataset.sizes, None, BATCH_SIZE, seed=0)
    steps = len(paths) // BATCH_SIZE
    loader = make_train_loader(dataset, stream, None, seed=0, first_step=0, last_step=steps, num_workers=num_workers)
    for batch in loader:
        yield to_float(batch.clips, MEAN, STD)


def peer_batches(paths: list[str], num_workers: int) -> Iterator[Tensor]:
    """Yield normalized clips [B, C, T, H, W] of one pass over a dataset like that of V-JEPA."""
    yield from DataLoader(FloatFirstDataset(paths), BATCH_SIZE, shuffle=True, num_workers=num_workers)


class FloatFirstDataset(torch.utils.data.Dataset):
    """Decode with decord, convert full frames to float32, then augment and normalize."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        # Pixels stay in the range 0 to 255, and so do mean and standard deviation.
        self.mean, self.std = torch.tensor(MEAN) * 255, torch.tensor(STD) * 255

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        from decord import VideoReader, cpu

        video = VideoReader(self.paths[index], num_threads=-1, ctx=cpu(0))
        span = NUM_FRAMES * FRAME_STEP
        start = np.random.randint(0, len(video) - span)
        indices = np.linspace(start, start + span - 1, num=NUM_FRAMES).astype(np.int64)
        frames = torch.tensor(video.get_batch(indices).asnumpy(), dtype=torch.float32)
        clip = random_resized_crop(frames.permute(3, 0, 1, 2))
        if np.random.rand() < 0.5:
            clip = clip.flip(-1)
        # V-JEPA moves the channels last for normalization and back.
        flat = clip.reshape(3, -1).permute(1, 0)
        flat = flat.sub_(self.mean).div_(self.std)
        return flat.permute(1, 0).reshape(clip.shape)


def random_resized_crop(clip: Tensor) -> Tensor:
    """Crop a random window of a clip [C, T, H, W] and resize it to [C, T, CROP_SIZE, CROP_SIZE]."""
    height, width = clip.shape[-2:]
    while True:
        area = np.random.uniform(0.3, 1.0) * height * width
        ratio = np.exp(np.random.uniform(np.log(0.75), np.log(1.35)))
        w, h = int(round(np.sqrt(area * ratio))), int(round(np.sqrt(area / ratio)))
        if w <= width and h <= height:
            break
    top, left = np.random.randint(0, height - h + 1), np.random.randint(0, width - w + 1)
    window = clip[:, :, top : top + h, left : left + w]
    return F.interpolate(window, size=(CROP_SIZE, CROP_SIZE), mode="bilinear", align_corners=False)


def write_video(path: Path, seed: int, num_frames: int = 300, width: int = 340, height: int = 256) -> str:
    """Write an H.264 video with 30 frames per second: a panning textured image and a patch that moves across it."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 24, 32), dtype=np.float32))
    texture = F.interpolate(coarse, size=(height + 64, width + 64), mode="bicubic")[0].permute(1, 2, 0).numpy()
    texture = texture + rng.normal(0, 0.04, texture.shape)
    texture = (texture.clip(0, 1) * 255).astype(np.uint8)
    patch = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(num_frames):
            pan_y, pan_x = (int(32 + 31 * np.sin(t / period)) for period in (37, 53))
            image = texture[pan_y : pan_y + height, pan_x : pan_x + width].copy()
            y, x = 3 * t % (height - 48), 2 * t % (width - 48)
            image[y : y + 48, x : x + 48] = patch
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return str(path)
