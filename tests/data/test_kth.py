"""A small tree of the layout of KTH actions: AVI files in folders of their actions, and the list."""

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data import DataConfig, Draw, VideoError
from tubelet.data.kth import ACTIONS, Dataset, read_list
from tubelet.data.transforms import EvalTransform

LIST = """
The video database containing six types of human actions
Training:   person11, 12, 13, 14, 15, 16, 17, 18
The videos contain the following sequences (in frames):

person01_boxing_d1\t\tframes\t1-12, 13-20, 21-40
person13_handclapping_d3\t*missing*
person16_walking_d2\t\tframes\t5-30, 31-45
person17_walking_d4 \tframes\t 1-25
person25_running_d1\t\tframes\t2-22,23-40
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory, make_video):
    folder = tmp_path_factory.mktemp("KTH actions")
    (folder / "00sequences.txt").write_text(LIST)
    for name in ("person01_boxing_d1", "person16_walking_d2", "person17_walking_d4", "person25_running_d1"):
        action = name.split("_")[1]
        (folder / action).mkdir(exist_ok=True)
        path = folder / action / f"{name}_uncomp.avi"
        make_video(path, frames=40, rate=25, height=64, width=80, codec="mpeg4", options={"qmax": "2"})
    return folder


def dataset(entry, **options):
    data = DataConfig(datasets=[str(entry)], sampling_rate=1, crop_size=64, patch_size=8, **options)
    return Dataset(data, EvalTransform(64), on_error="raise")


def test_samples_are_the_listed_sequences_of_the_part(tree):
    of_parts = {part: dataset(f"{tree}:{part}") for part in ("train", "test")}
    names = {
        part: [f"{path.rsplit('/', 1)[1]} {ACTIONS[label]}" for path, label in zip(d.paths, d.labels, strict=True)]
        for part, d in of_parts.items()
    }
    assert names == {
        "train": [
            "person01_boxing_d1_uncomp.avi#1-12 boxing",
            "person01_boxing_d1_uncomp.avi#13-20 boxing",
            "person01_boxing_d1_uncomp.avi#21-40 boxing",
            "person16_walking_d2_uncomp.avi#5-30 walking",
            "person16_walking_d2_uncomp.avi#31-45 walking",
        ],
        "test": [
            "person17_walking_d4_uncomp.avi#1-25 walking",
            "person25_running_d1_uncomp.avi#2-22 running",
            "person25_running_d1_uncomp.avi#23-40 running",
        ],
    }
    assert sorted(dataset(tree).paths) == sorted([*of_parts["train"].paths, *of_parts["test"].paths])


def test_clips_stay_within_their_sequence(tree, numbers_of):
    data = dataset(f"{tree}:train", num_frames=6)
    for index, (first, last) in enumerate([(1, 12), (13, 20), (21, 40), (5, 30), (31, 40)]):  # the file has 40 frames
        starts = set()
        for epoch in range(12):
            sample = data[Draw(0, epoch, index, 0)]
            shown = numbers_of(sample.clips[0].permute(1, 2, 3, 0).numpy())
            assert np.array_equal(shown, sample.frames[0].numpy() + first - 1)
            assert shown.min() >= first - 1
            assert shown.max() <= last - 1
            starts.add(int(shown[0]))
        assert len(starts) > 1


def test_missing_files_are_skipped_with_a_warning(tree, tmp_path, caplog):
    (tmp_path / "00sequences.txt").write_text(LIST)
    (tmp_path / "person17_walking_d4_uncomp.avi").symlink_to(tree / "walking" / "person17_walking_d4_uncomp.avi")
    assert len(dataset(f"{tmp_path}:test")) == 1
    assert "1 files of 00sequences.txt are missing: person25_running_d1" in caplog.text
    with pytest.raises(ConfigError, match="files of all 5 sequences .* unpack the AVI files, such as person01_boxing"):
        dataset(f"{tmp_path}:train")


def test_other_folders_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist; give the folder of KTH actions"):
        dataset(tmp_path / "nowhere:train")
    with pytest.raises(ConfigError, match=r"holds no 00sequences\.txt"):
        dataset(tmp_path)
    (tmp_path / "00sequences.txt").write_text("person01_boxing 1-95\n")
    with pytest.raises(ConfigError, match="no line like `person01_boxing_d1"):
        read_list(tmp_path)
    (tmp_path / "00sequences.txt").write_text("person01_swimming_d1 frames 1-95\n")
    with pytest.raises(ConfigError, match="'person01_swimming_d1 frames 1-95': unknown action; expected one of boxing"):
        read_list(tmp_path)


def test_the_error_of_an_unreadable_file_names_the_sample(tree):
    samples = dataset(f"{tree}:train", filter_long_videos=1)
    for index, path in enumerate(samples.paths):
        with pytest.raises(VideoError) as info:
            samples[Draw(0, 0, index, 0)]
        assert (info.value.path, info.value.filtered) == (path, True)
