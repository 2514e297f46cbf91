import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tubelet.config import ConfigError
from tubelet.data import index_file
from tubelet.data.index_file import open_index


def write(file, **columns):
    pq.write_table(pa.table(columns), file)
    return file


@pytest.fixture
def index(tmp_path):
    return write(
        tmp_path / "index.parquet",
        path=["/data/ü.mp4", "broken.mp4", "sub/b c.mp4", "d.mp4", None],
        readable=[True, False, True, None, True],
        label=[4, 5, None, 0, 1],
        duration=[2.0, 100.0, None, 4.0, 7.0],
        codec=["h264"] * 5,
    )


def test_readable_rows_with_paths_from_the_folder_of_the_index(index, tmp_path):
    opened = open_index(index)
    assert opened.paths == ["/data/ü.mp4", str(tmp_path / "sub/b c.mp4"), str(tmp_path / "d.mp4")]
    assert opened.labels == [4, -1, 0]
    assert opened.cumulative_durations == [2.0, 5.0, 9.0]  # an unknown one counts as the mean


def test_only_paths_are_required(tmp_path):
    opened = open_index(write(tmp_path / "index.parquet", path=pa.array(["a.mp4", "b.mp4"], pa.large_string())))
    assert opened.paths == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
    assert opened.labels == [-1, -1]
    assert opened.cumulative_durations is None


def test_all_rows_in_order_over_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "_BATCH", 7)
    rng = np.random.default_rng(0)
    names = [f"/v/{'ö' * rng.integers(5)}{i}.mp4" for i in range(500)]
    readable = rng.random(500) < 0.7
    durations = rng.integers(1, 9, 500)
    path = tmp_path / "index.parquet"
    table = pa.table({"path": names, "readable": readable, "label": np.arange(500), "duration": durations})
    pq.write_table(table, path, row_group_size=60)
    opened = open_index(path)
    assert opened.paths == [name for name, used in zip(names, readable, strict=True) if used]
    assert opened.labels == np.arange(500)[readable].tolist()
    np.testing.assert_array_equal(np.asarray(opened.cumulative_durations), np.cumsum(durations[readable]))


def test_the_rows_are_converted_once_and_again_after_a_change(index, monkeypatch):
    open_index(index)
    convert = index_file._convert
    monkeypatch.setattr(index_file, "_convert", None)
    assert len(open_index(index).paths) == 3
    monkeypatch.setattr(index_file, "_convert", convert)
    write(index, path=["new.mp4"])
    assert len(open_index(index).paths) == 1


def test_in_a_folder_that_cannot_be_written_the_users_cache_is_used(index, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    convert = index_file._convert

    def refuse(path, stored):
        if stored.parent == index.parent:
            raise PermissionError(13, "Permission denied")
        convert(path, stored)

    monkeypatch.setattr(index_file, "_convert", refuse)
    assert open_index(index).labels == [4, -1, 0]
    assert len(list((tmp_path / "cache" / "tubelet").iterdir())) == 1
    monkeypatch.setattr(index_file, "_convert", None)
    assert open_index(index).labels == [4, -1, 0]


def test_rows_are_not_pickled(tmp_path):
    names = [f"{i}.mp4" for i in range(10_000)]
    opened = open_index(write(tmp_path / "i.parquet", path=names, duration=[1.0] * 10_000))
    np.asarray(opened.cumulative_durations)
    pickled = pickle.dumps(opened)
    assert len(pickled) < 3000
    assert pickle.loads(pickled).paths[9_999] == str(tmp_path / "9999.mp4")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a.mp4"]}, "has no column path; it has name"),
        ({"path": [1]}, "column path is int64; it has to be text"),
        ({"path": ["a.mp4"], "label": ["cat"]}, "column label is string; it has to be an integer"),
        ({"path": ["a.mp4"], "readable": [False]}, "none of the videos in this index is readable"),
    ],
)
def test_the_error_of_an_unusable_index_says_why(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=f"index.parquet.*{message}"):
        open_index(write(tmp_path / "index.parquet", **columns))


def test_a_file_that_is_no_index_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "index.parquet").write_text("path\na.mp4\n")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        open_index(tmp_path / "index.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["index.parquet"]
