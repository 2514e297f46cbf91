"""Loading of random clips from an S3 server on this machine (moto's), compared with the same files on disk.

The server answers in Python, on the processors that also decode: a real one is faster, but farther away. It needs the
test requirements (moto, s3fs).

    python -m benchmarks storage
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from app.pack.options import Options
from app.pack.train import main as pack
from benchmarks.harness import Row, time_alternately
from benchmarks.loader import BATCH_SIZE, FRAME_STEP, seconds_after_first, write_video
from benchmarks.packed import batches
from tubelet.config import check
from tubelet.runtime.distributed import World, free_address

CROP = 224
SECONDS_TO_START = 60


def run(repeats: int = 3, num_videos: int = 8, passes: int = 10, num_workers: int = 2) -> list[Row]:
    """Compare loading from S3 and from disk, of files and of shards.

    Args:
        repeats: Timed runs of each side.
        num_videos: Number of generated videos.
        passes: Passes over the videos in each run.
        num_workers: Worker processes.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name, _server() as files:
        originals, packed = Path(name) / "originals", Path(name) / "packed"
        originals.mkdir()
        for seed in range(num_videos):
            write_video(originals / f"{seed}.mp4", seed)
        raw = {"app": "pack", "folder": str(packed), "data": {"datasets": [str(originals)]}, "videos_per_shard": 4}
        pack(check(raw, Options, "benchmark"), World())
        files.mkdir("benchmark")
        for folder, kind in ((originals, "video_dataset"), (packed, "webdataset")):
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    files.put(str(path), f"benchmark/{folder.name}/{path.name}")
            timing = time_alternately(
                lambda: batches(f"s3://benchmark/{folder.name}", kind, CROP, FRAME_STEP, num_workers, passes),  # noqa: B023
                lambda: batches(folder, kind, CROP, FRAME_STEP, num_workers, passes),  # noqa: B023
                repeats,
                seconds_after_first,
            )
            clips = passes * num_videos - BATCH_SIZE
            what = {"video_dataset": "files", "webdataset": "packed shards"}[kind]
            ours, peer = f"{clips / timing.ours:.1f} clips/s", f"{clips / timing.peer:.1f} clips/s"
            rows.append(Row(f"S3 against disk, {what}", ours, peer, timing.ratio))
    return rows


@contextlib.contextmanager
def _server() -> Iterator:
    """Start an S3 server and yield its file system; `s3://` refers to it until then."""
    port = int(free_address().rpartition(":")[2])
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        mock.patch.dict(os.environ, {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}),
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
    ):
        import s3fs

        try:
            _wait_for(port, server)
            yield s3fs.S3FileSystem()
        finally:
            server.terminate()


def _wait_for(port: int, server: subprocess.Popen) -> None:
    for _ in range(10 * SECONDS_TO_START):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError("moto.server did not start; install the test requirements")
