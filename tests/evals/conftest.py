"""Tiny labelled videos and images: a bright bar that moves to the right (0), to the left (1) or stands still (2)."""

import av
import numpy as np
import pytest
from PIL import Image

from tubelet.probing import results

SIDE, FRAMES, CLASSES = 32, 8, 3
DRAW_CONFUSION = results.draw_confusion


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    """Probes end without the figure of their confusion matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "draw_confusion", lambda path, *_: path.touch())
        yield


@pytest.fixture
def with_figure(monkeypatch):
    """Probes of this test draw the confusion matrix."""
    monkeypatch.setattr(results, "draw_confusion", DRAW_CONFUSION)


def bar(label, start):
    frames = np.full((FRAMES, SIDE, SIDE, 3), 40, np.uint8)
    for t in range(FRAMES):
        left = (start + (2 * t, -2 * t, 0)[label]) % SIDE
        frames[t, :, left : left + 6] = 220
    return frames


def write_video(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A folder with train.csv (18 videos) and val.csv (12)."""
    folder = tmp_path_factory.mktemp("labelled videos")
    rng = np.random.default_rng(0)
    for name, count in (("train", 18), ("val", 12)):
        lines = []
        for i in range(count):
            path = folder / f"{name}{i}.mp4"
            write_video(path, bar(i % CLASSES, int(rng.integers(SIDE))))
            lines.append(f'"{path}" {i % CLASSES}\n')
        (folder / f"{name}.csv").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Folders train and val with a subfolder for each of two colours."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in (("train", 8), ("val", 5)):
        for label, colour in enumerate(("blue", "red")):
            (folder / name / colour).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (40, 48, 3)).astype(np.uint8)
                pixels[..., 2 - 2 * label] += 150
                Image.fromarray(pixels).save(folder / name / colour / f"{i}.png")
    return folder


@pytest.fixture
def raw(labelled, tmp_path):
    """The YAML of a probe of a tiny random encoder on the labelled videos."""
    return {
        "eval_name": "video_classification_frozen",
        "folder": str(tmp_path / "probe"),
        "data": {
            "dataset_train": str(labelled / "train.csv"),
            "dataset_val": str(labelled / "val.csv"),
            "num_classes": CLASSES,
            "frames_per_clip": 4,
            "frame_step": 1,
            "num_segments": 2,
            "num_workers": 0,
        },
        "optimization": {
            "resolution": 32,
            "batch_size": 8,
            "num_epochs": 3,
            "heads": {"lr": [1e-3, 1e-2], "weight_decay": [0.01, 0.1]},
        },
        "pretrain": {
            "checkpoint": "random",
            "model_name": "vit_tiny",
            "encoder_args": {"embed_dim": 24, "depth": 1, "num_heads": 2},
            "patch_size": 8,
        },
    }
