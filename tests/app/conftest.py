"""A few small videos and a pretraining of them that takes a second."""

import av
import numpy as np
import pytest
import yaml

from tubelet.data.generated_files import encode

RATE, FPS = 8000, 8


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Folder of 10 mp4 files of 14 frames, 32×32: a random picture that moves."""
    folder = tmp_path_factory.mktemp("my videos")
    for number in range(10):
        picture = np.random.default_rng(number).integers(0, 255, (46, 46, 3), dtype=np.uint8)
        with av.open(str(folder / f"clip {number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            for t in range(14):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[t : t + 32, :32]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder


@pytest.fixture
def small(videos, tmp_path):
    """`small(**sections)`: path of a YAML file for a pretraining of 14 steps; sections are merged into it."""

    def write(name="small.yaml", **sections):
        raw = {
            "app": "vjepa",
            "folder": str(tmp_path / "run"),
            "data": {
                "datasets": [str(videos)],
                "batch_size": 4,
                "num_frames": 8,
                "tubelet_size": 2,
                "sampling_rate": 1,
                "crop_size": 32,
                "patch_size": 8,
                "num_workers": 0,
            },
            "mask": [
                {"num_blocks": 2, "spatial_scale": [0.3, 0.3], "aspect_ratio": [0.75, 1.5]},
                {"num_blocks": 1, "spatial_scale": [0.5, 0.5], "aspect_ratio": [0.75, 1.5]},
            ],
            "model": {
                "model_name": "vit_tiny",
                "encoder_args": {"embed_dim": 48, "depth": 2, "num_heads": 2, "drop_rate": 0.1},
                "pred_depth": 1,
                "pred_embed_dim": 24,
            },
            "optimization": {"epochs": 7, "warmup": 1, "lr": 1e-3},
            "meta": {"dtype": "float32", "seed": 3},
            "logging": {
                "log_every": 1,
                "checkpoint_every_steps": 2,
                "monitor_every": 5,
                "monitor_clips": 6,
                "loggers": [],
            },
        }
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def write_sounding(path, bright, high, click=0.0):
    """Write a video of 1.5 seconds, dark or bright, with a low or high tone, and a flash with a click at a time."""
    frames = np.full((12, 32, 32, 3), 150 if bright else 60, np.uint8)
    time = np.arange(12 * RATE // FPS) / RATE
    sound = 0.1 * np.sin(2 * np.pi * (2000 if high else 500) * time)
    if click:
        frames[round(click * FPS)] = 255
        sound[round(click * RATE) : round(click * RATE) + 400] *= 8
    encode(frames, path, FPS, np.stack([sound, sound]).astype(np.float32), RATE)


@pytest.fixture(scope="session")
def sounding(tmp_path_factory):
    """The label is whether either the picture is bright or the tone is high, not both. The last file has no sound."""
    folder = tmp_path_factory.mktemp("audible")
    for name, count in (("train", 16), ("val", 9)):
        lines = []
        for i in range(count):
            bright, high = i % 2, i // 2 % 2
            write_sounding(folder / f"{name}{i}.mp4", bright, high, click=(3 + i % 6) / FPS)
            lines.append(f"{name}{i}.mp4 {bright ^ high}\n")
        (folder / f"{name}.csv").write_text("".join(lines))
    encode(np.full((12, 32, 32, 3), 60, np.uint8), folder / "val8.mp4", FPS)
    return folder


def classification(sounding, folder):
    """Options of a classification of these videos without encoders and optimization."""
    return {
        "app": "audio",
        "task": "classification",
        "folder": str(folder),
        "data": {
            "dataset_train": str(sounding / "train.csv"),
            "dataset_val": str(sounding / "val.csv"),
            "num_classes": 2,
            "frames_per_clip": 4,
            "fps": 8,
            "num_workers": 0,
        },
        "sound": {"sample_rate": RATE, "channels": 2},
        "fusion": {"embed_dim": 24, "depth": 1, "num_heads": 2},
    }
