import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from app.index.train import main
from app.main import PROGRAMS
from tests.processes import run as run_on_processes
from tubelet.config import ConfigError
from tubelet.data import DataConfig, Draw
from tubelet.data.transforms import EvalTransform
from tubelet.data.video_dataset import Dataset
from tubelet.runtime.distributed import World
from tubelet.runtime.launch import load

FNAME = str(Path(__file__).parents[2] / "configs" / "data" / "index.yaml")


def options(folder, *datasets, **overrides):
    changes = [f"folder={folder}", f"data.datasets=[{','.join(map(str, datasets))}]", "processes=1"]
    return load(PROGRAMS, FNAME, [*changes, *(f"{key}={value}" for key, value in overrides.items())]).options


@pytest.fixture
def data(videos, tmp_path):
    """Ten videos, a larger copy of one of them, and a broken file."""
    folder = shutil.copytree(videos, tmp_path / "data")
    (folder / "broken.mp4").write_text("no video")
    with av.open(str(folder / "clip 3.mp4")) as source, av.open(str(folder / "large.mp4"), "w") as target:
        stream = target.add_stream("libx264", rate=12, options={"crf": "10"})
        stream.width = stream.height = 64
        for frame in source.decode(video=0):
            frame = frame.reformat(64, 64)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        target.mux(stream.encode())
    return folder


def test_index_near_duplicates_and_report(data, tmp_path):
    main(options(tmp_path / "index", data, **{"duplicates.drop": "true"}), World())
    table = pq.read_table(tmp_path / "index" / "index.parquet").to_pylist()
    assert len(table) == 12
    assert [Path(row["path"]).name for row in table if not row["readable"]] == ["broken.mp4"]
    listed = (tmp_path / "index" / "index.duplicates.csv").read_text().splitlines()
    assert len(listed) == 2
    assert f'"{data / "clip 3.mp4"}","{data / "large.mp4"}"' in listed[1]
    kept = pq.read_table(tmp_path / "index" / "index.deduplicated.parquet").to_pylist()
    assert kept == [row for row in table if not row["path"].endswith("clip 3.mp4")]
    page = (tmp_path / "index" / "index.html").read_text()
    for text in ("12 files", "11 can be read", "1 of 12 files", "broken.mp4", "h264", "32 × 32", "clip 3.mp4"):
        assert text in page
    assert page.count("<img") == 5  # four histograms and the thumbnails


def test_clips_from_an_index_are_those_from_the_folder(data, tmp_path):
    main(options(tmp_path / "index", data), World())
    (data / "broken.mp4").unlink()
    clips = []
    for source in (data, tmp_path / "index" / "index.parquet"):
        config = DataConfig(datasets=[str(source)], num_frames=4, sampling_rate=2, crop_size=32)
        dataset = Dataset(config, EvalTransform(32), seed=1)
        samples = [dataset[Draw(0, 0, index, 0)] for index in range(len(dataset))]
        clips.append({sample.path: sample.clips.numpy() for sample in samples})
    assert clips[0].keys() == clips[1].keys()
    assert len(clips[0]) == 11
    for path, clip in clips[0].items():
        np.testing.assert_array_equal(clip, clips[1][path])


def test_two_processes_write_what_one_does(data, tmp_path):
    main(options(tmp_path / "one", data), World())
    run_on_processes(main, options(tmp_path / "two", data, part_size=1), 2)
    one, two = (pq.read_table(tmp_path / name / "index.parquet").to_pylist() for name in ("one", "two"))
    assert one == two


def test_a_source_without_durations_cannot_be_drawn_by_them(data):
    config = DataConfig(datasets=[str(data)], sampling_rate=2, crop_size=32, weight_by_duration=True)
    with pytest.raises(ConfigError, match=r"weight_by_duration: '.*/data' has no durations; give an index"):
        Dataset(config, EvalTransform(32))
