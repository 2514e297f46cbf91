import json
import random

import av
import numpy as np
import pytest
import torch
import yaml

from tubelet.config.translation import to_canonical
from tubelet.grid import ClipShape
from tubelet.models import build_encoder
from tubelet.runtime import checkpoint

CONFIG = {
    "app": "vjepa",
    "data": {
        "datasets": [],
        "dataset_type": "VideoDataset",
        "mask_type": "multiblock3d",
        "num_frames": 8,
        "tubelet_size": 2,
        "sampling_rate": 1,
        "crop_size": 64,
        "patch_size": 16,
    },
    "data_aug": {},
    "mask": [
        {"spatial_scale": [0.3, 0.3], "aspect_ratio": [0.75, 1.5], "num_blocks": 1},
        {"spatial_scale": [0.5, 0.5], "aspect_ratio": [1.0, 1.0], "num_blocks": 1},
    ],
    "model": {"model_name": "vit_tiny", "encoder_args": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "pred_depth": 1},
}


def write_video(path, frames):
    """Encode uint8 frames [T, H, W, 3] with h264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def moving_square(seed, count=8, size=64):
    rng = np.random.default_rng(seed)
    frames = np.broadcast_to(rng.integers(0, 90, 3, dtype=np.uint8), (count, size, size, 3)).copy()
    color, start, step = rng.integers(120, 255, 3), rng.integers(0, size // 2, 2), rng.integers(0, 4, 2)
    for t, frame in enumerate(frames):
        y, x = start + t * step
        frame[y : y + 16, x : x + 16] = color
    return frames


def make_run(folder, videos):
    """Make the folder of a finished pretraining: configuration, log, and a checkpoint of random weights."""
    videos.mkdir(parents=True)
    for seed in range(4):
        write_video(videos / f"clip {seed}.mp4", moving_square(seed))
    config = CONFIG | {"data": CONFIG["data"] | {"datasets": [str(videos)]}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rng = random.Random(0)
    lines = []
    for step in range(1, 41):
        line = {"step": step, "loss": 2 / step + rng.random() / 9, "loss_jepa": 1 / step, "clips_per_second": 90.0}
        line["step_seconds"] = 0.5
        if step % 10 == 0:
            line |= {"rank_centered": 20.0 + step, "rank_uncentered": 5 + step / 10}
            line |= {"spread_within": 0.4, "spread_across": 0.3}
        lines.append(line)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    data = config["data"]
    sizes = {key: data[key] for key in ("crop_size", "num_frames", "patch_size", "tubelet_size")}
    state = build_encoder(to_canonical(config)["encoder"], ClipShape(**sizes)).state_dict()
    content = checkpoint.CheckpointState({"encoder": state, "target_encoder": state}, metadata={"config": config})
    checkpoint.save(folder / "checkpoints", 40, content, keep=1)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return make_run(folder / "run", folder / "videos")
