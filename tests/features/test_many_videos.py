"""One-minute videos by the dozen, killed in between. With TUBELET_VIDEOS=300, the full size."""

import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tubelet.features.store import Store

COUNT = int(os.environ.get("TUBELET_VIDEOS", "24"))
KILLS = 3
SIZE = (48, 64)


def write_minute(path, rng):
    """A second of video, of which the packets are written sixty times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "bf": "0", "g": "25"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        color, speed = rng.integers(30, 200, 3), rng.integers(1, 4)
        packets = []
        for t in range(25):
            frame = np.full((*SIZE, 3), color, np.uint8)
            frame[:, speed * t % 56 :][:, :8] = 250
            packets += stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        packets += stream.encode(None)
        contents = [(bytes(packet), packet.is_keyframe) for packet in packets]
        for number in range(60 * 25):
            packet = av.Packet(contents[number % 25][0])
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = number
            packet.is_keyframe = contents[number % 25][1]
            container.mux(packet)


def command(videos, folder):
    options = {
        "folder": folder,
        "data.datasets": f"[{videos}]",
        "data.overlap": 4,
        "data.frame_step": 8,
        "data.resolution": 32,
        "data.num_workers": 1,
        "pretrain.folder": "null",
        "pretrain.checkpoint": "random",
        "pretrain.encoder": "{name: vit_tiny, embed_dim: 32, depth: 1, num_heads: 2}",
        "pretrain.patch_size": 8,
        "videos_per_part": 4,
    }
    overrides = [f"{key}={value}" for key, value in options.items()]
    return [
        sys.executable,
        "-m",
        "evals.main",
        "--fname",
        "configs/evals/features.yaml",
        "--devices",
        "cpu",
        *overrides,
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_minute_videos_and_kills_lose_nothing(tmp_path):
    rng = np.random.default_rng(0)
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(COUNT):
        write_minute(videos / f"{number:04d}.mp4", rng)
    begun = time.monotonic()
    subprocess.run(command(videos, tmp_path / "straight"), check=True)
    straight = time.monotonic() - begun
    draw, begun, done = random.Random(0), time.monotonic(), 0
    tables = tmp_path / "killed" / "table"
    parts = -(-COUNT // 4)
    for kill in range(KILLS):
        process = subprocess.Popen(command(videos, tmp_path / "killed"), start_new_session=True)
        goal = min(parts - 1, done + draw.randint(1, max(1, parts // 4)))
        while len(list(tables.glob("*.parquet"))) < goal:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = len(list(tables.glob("*.parquet")))
        assert left >= goal > done or kill, (left, goal)
        done = left
    subprocess.run(command(videos, tmp_path / "killed"), check=True)
    killed = time.monotonic() - begun
    names = [path.relative_to(tmp_path / "straight") for path in (tmp_path / "straight").rglob("part-*")]
    assert len(names) == 2 * parts
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    items = Store(tmp_path / "killed").items("mean", "clip")
    assert len(set(items.paths)) == COUNT
    assert (items.ends.reshape(COUNT, -1)[:, -1] == 60).all()
    assert not list(Path(tmp_path).rglob("*.tmp"))
    print(f"{COUNT} videos, {len(items)} clips: {straight:.0f} s; with {KILLS} kills {killed:.0f} s")
