"""Extracted features against a slow loop; stopped, resumed and shared extractions against a straight one."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from evals.features import eval as program
from tests.processes import run as run_on_processes
from tubelet.config import ConfigError, check
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.storage import requests
from tubelet.data.transforms import EvalTransform
from tubelet.data.windows import sliding_windows
from tubelet.features import store
from tubelet.features.reading import ClipReader
from tubelet.probing.clips import LabelledClips
from tubelet.probing.data_options import LabelledDataConfig
from tubelet.probing.encoder import FrozenEncoder, with_normalization
from tubelet.probing.heads import pool
from tubelet.runtime.distributed import World

READABLE = [0, 1, 2, 3, 4, 5, 6]


def options_of(raw):
    return with_normalization(check(raw, program.Options, "test.yaml"))


def encoder_of(raw):
    o = options_of(raw)
    return FrozenEncoder(o.pretrain, o.data, o.data.resolution, torch.device("cpu"), bfloat16=False)


def content(folder):
    """Every file of the store, as bytes."""
    files = [path for name in ("table", "tensors") for path in sorted((Path(folder) / name).iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in [*files, Path(folder) / "results.json"]}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Processes are forked, which threads of torch do not survive."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def straight(raw, extract, tmp_path):
    return content(extract(raw, folder=str(tmp_path / "straight")))


def test_features_and_times_are_those_of_a_slow_loop(raw, collection, extract):
    folder = Path(extract(raw))
    table = pq.read_table(folder / "table").to_pylist()
    files = sorted((folder / "tensors").glob("*.safetensors"))
    features = {kind: torch.cat([load_file(path)[kind] for path in files]) for kind in ("mean", "slots", "tokens")}
    encoder, expected, row = encoder_of(raw), [], 0
    reader = ClipReader(options_of(raw).data)
    for number in READABLE:
        path = str(collection / f"{number}.mp4")
        video = open_video(path, "pyav")
        numbers = sliding_windows(video.num_frames, 10.0, reader.options, 1)
        for clip, frames in enumerate(numbers):
            pixels = EvalTransform(32)(read_frames(video, frames, path))
            tokens = encoder(pixels[None])[0, 0]
            torch.testing.assert_close(features["tokens"][row], tokens, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(features["mean"][row], tokens.mean(0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(features["slots"][row], pool(tokens, 2), atol=1e-5, rtol=1e-5)
            end = min(frames[0] + 8, video.num_frames) / 10
            expected.append({"path": path, "clip": clip, "start": frames[0] / 10, "end": end})
            row += 1
        assert expected[-1]["end"] == video.num_frames / 10  # the last window is aligned to the end
    assert [{key: each[key] for key in expected[0]} for each in table] == expected
    assert [each["label"] for each in table if each["clip"] == 0] == [0, 1, 0, 1, 0, 1, 2]
    bad = [line.split("\t")[0] for line in (folder / "bad_files.txt").read_text().splitlines()]
    assert bad == [str(collection / "text.mp4"), str(collection / "damaged.mp4")]
    results = json.loads((folder / "results.json").read_text())
    assert (results["videos"], results["clips"], results["unreadable"]) == (7, len(expected), 2)
    assert results["encoder"] == encoder.fingerprint


def test_metadata_says_what_the_features_are(raw, extract):
    folder = Path(extract(raw, features=["mean"], dtype="float16"))
    for part in sorted((folder / "table").iterdir()):
        description = json.loads(pq.read_schema(part).metadata[b"tubelet"])
        assert description["encoder"] == encoder_of(raw).fingerprint
        assert description["clips"]["overlap"] == 1
        assert description["clips"]["frame_step"] == 2
        assert load_file(folder / "tensors" / f"{part.stem}.safetensors")["mean"].dtype == torch.float16


def test_clips_of_segments_are_those_of_a_probe(raw, collection, extract, tmp_path):
    lines = [f'"{collection / f"{number}.mp4"}" 0\n' for number in READABLE]
    (tmp_path / "list.csv").write_text("".join(lines))
    data = {key: raw["data"][key] for key in ("frames_per_clip", "frame_step", "num_workers")}
    data |= dict.fromkeys(("dataset_train", "dataset_val"), str(tmp_path / "list.csv"))
    clips = LabelledClips(
        check({**data, "num_classes": 2, "num_segments": 3}, LabelledDataConfig, "test"), "dataset_val", resolution=32
    )
    (batch,) = clips.batches([torch.arange(len(READABLE))])
    expected = encoder_of(raw)(batch.clips[:, None])[:, 0]
    found = store.Store(extract(raw, features=["tokens"], data={"num_segments": 3, "overlap": 0}))
    assert found.table["clip"].to_pylist() == [0, 1, 2] * len(READABLE)
    torch.testing.assert_close(found.load("tokens"), expected, atol=1e-5, rtol=1e-5)


def kill_in_part(raw, part, place):
    """An extraction in a process that kills itself while it writes a part: before its table or before its tensors."""
    module = store.pq if place == "write_table" else store
    original = getattr(module, place)

    def killing(path, *arguments, **more):
        if f"part-{part:06d}" in str(arguments[0] if place == "write_table" else path):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *arguments, **more)

    setattr(module, place, killing)
    program.main(check(raw, program.Options, "test.yaml"), World())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["save_tensors", "write_table"])
def test_killed_at_any_place_it_loses_one_part_and_nothing_else(raw, extract, straight, workers, place):
    raw["data"]["num_workers"] = workers
    context = multiprocessing.get_context("fork")
    process = context.Process(target=kill_in_part, args=(raw, 2, place))
    process.start()
    process.join(timeout=60)
    exitcode = process.exitcode
    process.kill()  # one that hangs would also keep pytest from exiting
    assert exitcode == -signal.SIGKILL
    folder = Path(raw["folder"])
    assert sorted(path.name for path in (folder / "table").iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "table").iterdir()}
    with pytest.raises(ConfigError, match="has 2 of 5 parts"):
        store.Store(folder)
    extract(raw)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # finished parts are kept
    assert content(folder) == straight
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "bad_files.txt").read_text().count("\n") == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_and_segments_changes_nothing(raw, extract, straight, workers, monkeypatch):
    monkeypatch.setattr("tubelet.features.reading.SEGMENT_BYTES", 3 * 4 * 32 * 32 * 2)
    assert content(extract(raw, data={"num_workers": workers})) == straight


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_nothing(raw, straight, processes):
    run_on_processes(program.main, check(raw, program.Options, "test.yaml"), processes)
    assert content(raw["folder"]) == straight


def test_shards_are_one_store(raw, extract, straight, tmp_path):
    root = tmp_path / "shards"
    for index in range(3):
        if index:
            with pytest.raises(ConfigError, match="parts; run evals.features again"):
                store.Store(root)
        extract({**raw, "shard": {"index": index, "count": 3}, "folder": str(root / f"shard.index-{index}")})
    files = {str(path.relative_to(path.parents[1])): path.read_bytes() for path in root.glob("*/t*/part-*")}
    assert files == {name: data for name, data in straight.items() if "part-" in name}
    whole = store.Store(tmp_path / "straight").items("mean", "video")
    found = store.Store(root).items("mean", "video")
    assert found.paths == whole.paths
    assert torch.equal(found.vectors, whole.vectors)
    listed = [(root / f"shard.index-{i}" / "bad_files.txt").exists() for i in range(3)]
    assert listed == [False, True, True]


def test_another_encoder_other_videos_or_options_are_refused(raw, extract, collection):
    extract(raw)
    earlier = content(raw["folder"])
    with pytest.raises(ConfigError, match=r"pretrain.init_seed: 0 there, 1 here(.|\n)*another folder"):
        extract(raw, pretrain={"init_seed": 1})
    with pytest.raises(ConfigError, match=r"data.overlap: 1 there, 2 here"):
        extract(raw, data={"overlap": 2})
    lines = (collection / "videos.csv").read_text()
    try:
        (collection / "videos.csv").write_text(lines.splitlines(keepends=True)[0])
        with pytest.raises(ConfigError, match=r"num_videos: 9 there, 1 here"):
            extract(raw)
    finally:
        (collection / "videos.csv").write_text(lines)
    extract(raw, data={"num_workers": 1})
    assert content(raw["folder"]) == earlier


def test_other_weights_under_the_same_name_are_refused(raw, extract, tmp_path, monkeypatch):
    extract(raw)
    monkeypatch.setattr("tubelet.probing.encoder.fingerprint", lambda module: "another")
    with pytest.raises(ConfigError, match=r"another encoder or of other videos:\n  encoder: .* 'another' here"):
        extract(raw)


def test_features_beyond_float16_are_an_error(raw, extract, monkeypatch):
    call = FrozenEncoder.__call__
    monkeypatch.setattr(FrozenEncoder, "__call__", lambda self, clips: 1e6 * call(self, clips))
    with pytest.raises(ConfigError, match="set dtype: float32"):
        extract(raw, dtype="float16")
    extract(raw, dtype="float32", folder=raw["folder"] + "32")


def test_images_and_why_they_have_no_windows(raw, extract, tmp_path):
    for name in ("blue", "red"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.full((40, 48, 3), 90, np.uint8)).save(tmp_path / "images" / name / "a.png")
    data = {"datasets": [str(tmp_path / "images")], "format": "image_dataset", "overlap": 0}
    with pytest.raises(ConfigError, match="image_dataset has no video files"):
        extract(raw, data=data)
    items = store.Store(extract(raw, data={**data, "num_segments": 1})).items("mean", "clip")
    assert items.labels.tolist() == [0, 1]
    assert np.isnan(items.starts).all()


@pytest.mark.parametrize("change", [{"overlap": 4}, {"overlap": 1, "num_segments": 2}], ids=str)
def test_impossible_overlaps(raw, change):
    raw["data"] |= change
    with pytest.raises(ConfigError, match="overlap"):
        check(raw, program.Options, "test.yaml")


def test_paths_that_are_not_utf8(raw, extract, collection, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.mp4"
    with open(name, "wb") as file:
        file.write((collection / "0.mp4").read_bytes())
    items = store.Store(extract(raw, data={"datasets": [os.fsdecode(name)]})).items("mean", "video")
    assert items.paths == [f"{tmp_path}/\\xff.mp4"]


def test_a_store_has_no_credentials(raw, extract, tmp_path, monkeypatch):
    (tmp_path / "list.csv").write_text("http://user:pw@127.0.0.1:9/a.mp4?Signature=secret 1\n")

    def missing(*_):
        raise requests.StorageError("HTTP status 404")

    monkeypatch.setattr(requests, "status", missing)
    folder = Path(extract(raw, data={"datasets": [str(tmp_path / "list.csv")]}))
    assert (folder / "bad_files.txt").read_text().startswith("http://127.0.0.1:9/a.mp4?…\t")
    for path in filter(Path.is_file, folder.rglob("*")):
        assert b"secret" not in path.read_bytes()
        assert b"user:pw" not in path.read_bytes()
