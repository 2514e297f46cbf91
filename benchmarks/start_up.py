"""Start of training from a list and from an index of N videos, compared with Python lists of all paths and labels.

A new process makes the data set and the stream of samples, starts worker processes and gets the first batches. The
clips are empty, so that nothing is decoded. The memory is the proportional set size (each page divided among the
processes that share it) of the process and its workers, after 50 batches, above that of the same with ten videos:
torch itself takes more than the rows.

    python -m benchmarks start_up
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.harness import Row
from tubelet.data.index_file import open_index
from tubelet.data.list_forms import parse_line
from tubelet.data.video_dataset import Dataset, Views

KINDS = ("index", "list", "python lists")
FILES = 1000
"""Files that exist; the rows name them again and again."""

MEASURE = """
import sys, time
import numpy as np, torch
from benchmarks.start_up import EmptyClips, ListsInMemory, proportional_bytes
from tubelet.data import DataConfig
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream

kind, path, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
start, cpu = time.perf_counter(), time.process_time()
options = DataConfig(datasets=[path], sampling_rate=1, crop_size=16, weight_by_duration=kind == "index")
dataset = (ListsInMemory if kind == "python lists" else EmptyClips)(options, None, on_error="replace")
durations = dataset.cumulative_durations if kind == "index" else None
stream = SampleStream(dataset.sizes, None, 64, seed=0, cumulative_durations=durations)
loader = make_train_loader(dataset, stream, None, seed=0, first_step=0, last_step=60, num_workers=workers)
for step, batch in enumerate(loader):
    if step == 0:
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if step == 50:
        print(seconds, cpu, proportional_bytes())
        break
"""


def run(rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000), num_workers: int = 4) -> list[Row]:
    """Compare the kinds of sources.

    Args:
        rows: Numbers of videos; Python lists are measured up to a million.
        num_workers: Worker processes.
    """
    table = []
    with tempfile.TemporaryDirectory() as folder:
        base = {kind: measure(kind, write(kind, Path(folder), 10), num_workers)[-1] for kind in KINDS}
        for number in rows:
            found = {}
            for kind in KINDS:
                if kind == "python lists" and number > 1_000_000:
                    continue
                *seconds, size = measure(kind, write(kind, Path(folder), number), num_workers)
                found[kind] = (*seconds, (size - base[kind]) / 1e6)
            for kind in KINDS[:2]:
                ours, peer = found[kind], found.get("python lists")
                table.append(
                    Row(
                        f"first batch, {kind} of {number:,} videos, {num_workers} workers",
                        "{:.2f} s ({:.2f} s CPU), {:.0f} MB".format(*ours),
                        "-" if peer is None else "{:.2f} s ({:.2f} s CPU), {:.0f} MB".format(*peer),
                        None if peer is None else peer[0] / ours[0],
                    )
                )
    return table


def write(kind: str, folder: Path, number: int) -> Path:
    """Write a list or an index of `number` rows, with labels and durations."""
    videos = folder / "videos of the benchmark"
    videos.mkdir(exist_ok=True)
    names = [str(videos / f"video_{i:06d}.mp4") for i in range(FILES)]
    for name in names:
        Path(name).touch()
    if kind != "index":
        path = folder / f"{number}.csv"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{names[i % FILES]} {i % 400}\n" for i in range(number))
        return path
    path = folder / f"{number}.parquet"
    schema = pa.schema(
        [("path", pa.string()), ("readable", pa.bool_()), ("label", pa.int64()), ("duration", pa.float64())]
    )
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, number, 1 << 16):
            row = np.arange(start, min(start + (1 << 16), number))
            columns = [[names[i % FILES] for i in row], row % 50 != 0, row % 400, rng.lognormal(3, 1, len(row))]
            writer.write_table(pa.table(columns, schema=schema))
    open_index(path)  # as the program that writes an index does
    return path


def measure(kind: str, path: Path, num_workers: int) -> tuple[float, float, int]:
    """Return the seconds to the first batch, those of the CPU in the main process, and the bytes of memory."""
    command = [sys.executable, "-c", MEASURE, kind, str(path), str(num_workers)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)
    seconds, cpu, size = result.stdout.split()
    return float(seconds), float(cpu), int(size)


class EmptyClips(Dataset):
    """The data set of training, except that clips are empty."""

    def read_views(self, path: str, rng: np.random.Generator) -> tuple[Views, np.ndarray]:
        return {"clip": torch.zeros(1, 3, 1, 1, 1, dtype=torch.uint8)}, np.zeros((1, 1), dtype=np.int64)


class ListsInMemory(EmptyClips):
    """All paths and labels as Python objects, and a check of at most 100,000 files: how lists were read first."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        lines = [line.strip() for line in Path(self.data.datasets[0]).read_text(encoding="utf-8").splitlines()]
        entries = [parse_line(line) for line in lines if line]
        folder = Path(self.data.datasets[0]).parent
        self.paths = [str(folder / name if (folder / name).exists() else Path(name)) for name, _ in entries]
        self.labels = [label for _, label in entries]
        for i in np.unique(np.linspace(0, len(self.paths) - 1, min(len(self.paths), 100_000)).astype(int)):
            assert os.path.exists(self.paths[i])


def proportional_bytes() -> int:
    """Return the proportional set size of this process and its children."""
    main = os.getpid()
    children = Path(f"/proc/{main}/task/{main}/children").read_text(encoding="utf-8").split()
    sizes = [Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8") for pid in (main, *children)]
    return sum(1024 * int(re.search(r"^Pss: +(\d+) kB", text, re.M)[1]) for text in sizes)
