"""Labelled videos of several lengths, broken ones among them, and the options of an extraction with a tiny encoder."""

import av
import numpy as np
import pytest

from evals.features import eval as program
from tubelet.config import check
from tubelet.runtime.distributed import World

LENGTHS = (9, 30, 16, 41, 12, 25, 18)


def write_video(path, length, seed):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10", "preset": "ultrafast", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
        base = rng.integers(40, 200, 3)
        for t in range(length):
            frame = np.full((40, 48, 3), base, np.uint8)
            frame[:, (5 * seed + 3 * t) % 40 :][:, :8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """A folder with a list of nine videos of three classes: the third is no video, the sixth breaks off."""
    folder = tmp_path_factory.mktemp("collection of videos")
    for number, length in enumerate(LENGTHS):
        write_video(folder / f"{number}.mp4", length, number)
    (folder / "text.mp4").write_bytes(b"no video")
    content = bytearray((folder / "3.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    content[start + len(content) // 4 : start + len(content) // 2] = bytes(len(content) // 4)
    (folder / "damaged.mp4").write_bytes(content)
    names = ["0.mp4", "1.mp4", "text.mp4", "2.mp4", "3.mp4", "damaged.mp4", "4.mp4", "5.mp4", "6.mp4"]
    lines = [f'"{folder / name}" {number % 3}\n' for number, name in enumerate(names)]
    (folder / "videos.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def raw(collection, tmp_path):
    """The YAML of an extraction."""
    return {
        "eval_name": "features",
        "folder": str(tmp_path / "features"),
        "pretrain": {
            "checkpoint": "random",
            "encoder": {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2},
            "patch_size": 8,
        },
        "data": {
            "datasets": [str(collection / "videos.csv")],
            "frames_per_clip": 4,
            "frame_step": 2,
            "overlap": 1,
            "resolution": 32,
            "num_workers": 0,
        },
        "features": ["mean", "slots", "tokens"],
        "batch_size": 5,
        "videos_per_part": 2,
    }


@pytest.fixture
def extract():
    def extract(raw, **changes):
        for name, change in changes.items():
            raw = {**raw, name: {**raw[name], **change} if isinstance(change, dict) else change}
        program.main(check(raw, program.Options, "test.yaml"), World())
        return raw["folder"]

    return extract
