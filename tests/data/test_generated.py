import json
from collections import Counter

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data import synthetic
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.generated import Settings, main, plan, write_dataset
from tubelet.data.sources import VIDEO_SUFFIXES, read_source
from tubelet.runtime.seeds import Purpose, numpy_generator

SETTINGS = Settings(clips=5, train=8, test=8, frames=8, size=32, seed=1)


def write(folder, settings=SETTINGS, processes=1):
    write_dataset(folder, settings, processes)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_are_identical_for_any_number_of_processes_and_after_an_interruption(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two", processes=2)
    expected = contents(tmp_path / "one")
    assert len([path for path in expected if path.suffix == ".mp4"]) == 21
    assert contents(tmp_path / "two") == expected
    for name in ("finished", "motion_test.csv", "pretrain/000003.mp4", "labelled/train_000000.mp4"):
        (tmp_path / "two" / name).unlink()
    untouched = tmp_path / "two" / "pretrain" / "000000.mp4"
    before = untouched.stat().st_mtime_ns
    write(tmp_path / "two")
    assert contents(tmp_path / "two") == expected
    assert untouched.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"holds clips with other settings \(frames, seed\)"):
        write(tmp_path / "one", Settings(clips=5, train=8, test=8, frames=10, size=32, seed=2))


def test_files_show_the_rendered_clips_and_lists_have_their_labels(tmp_path):
    write(tmp_path)
    motion = read_source(str(tmp_path / "motion_train.csv"), VIDEO_SUFFIXES)
    appearance = read_source(str(tmp_path / "appearance_train.csv"), VIDEO_SUFFIXES)
    assert motion.paths == appearance.paths
    assert len(read_source(str(tmp_path / "pretrain"), VIDEO_SUFFIXES).paths) == 5
    for number in (0, 5):
        video = open_video(motion.paths[number], "decord")
        assert video.fps == 12
        frames = read_frames(video, np.arange(8), motion.paths[number])
        rng = numpy_generator(1, Purpose.GENERATED_CLIP, 1, number)
        rendered = synthetic.render_clip(rng, motion.labels[number], appearance.labels[number], 8, 32)
        brightness = np.array([0.299, 0.587, 0.114])  # 4:2:0 averages the colors of four pixels, not their brightness
        assert np.abs((frames.astype(int) - rendered) @ brightness).mean() < 10


def test_labels_are_balanced(tmp_path):
    clips = [clip for clip in plan(tmp_path, Settings()) if clip.split == 1]
    assert set(Counter(clip.motion for clip in clips).values()) == {100}
    assert set(Counter(clip.appearance for clip in clips).values()) == {100}
    assert set(Counter((clip.motion, clip.appearance) for clip in clips).values()) == {12, 13}


# Pixel rows 0-15 and 16-31, columns likewise, of the first and the last frame, averaged: red channel of each motion.
MEANS = [
    [[[121.785, 139.379], [149.473, 129.918]], [[141.547, 129.652], [126.734, 129.355]]],
    [[[147.141, 114.793], [129.125, 128.332]], [[133.824, 132.699], [109.91, 121.422]]],
    [[[135.621, 145.57], [122.863, 123.445]], [[129.543, 123.797], [144.02, 153.902]]],
    [[[132.625, 108.734], [126.648, 126.719]], [[127.348, 140.969], [127.691, 129.855]]],
    [[[113.828, 117.582], [128.676, 124.25]], [[113.531, 129.086], [123.656, 128.887]]],
    [[[130.086, 126.09], [141.82, 109.492]], [[118.418, 138.023], [139.008, 123.836]]],
    [[[141.992, 115.516], [119.93, 129.328]], [[139.613, 115.961], [143.922, 126.309]]],
    [[[122.355, 131.887], [129.406, 130.082]], [[148.32, 120.738], [118.109, 155.562]]],
]


def test_clips_are_those_of_every_version(tmp_path):
    """Where a change to the renderer is intended, change `synthetic.RENDERER` as well."""
    for motion, expected in enumerate(MEANS):
        clip = synthetic.render_clip(numpy_generator(1, Purpose.GENERATED_CLIP, 1, motion), motion, 7 - motion, 8, 32)
        means = clip.reshape(8, 2, 16, 2, 16, 3).mean((2, 4))[[0, 7], :, :, 0]
        np.testing.assert_allclose(means, expected, atol=0.02)  # processors differ in the last bits of sin and exp
    labels = [(clip.motion, clip.appearance) for clip in plan(tmp_path, Settings(clips=6, train=1, test=1))]
    assert labels == [(3, 5), (3, 4), (4, 4), (1, 4), (7, 5), (5, 5), (0, 0), (0, 0)]


def test_a_data_set_of_version_0_1_is_continued(tmp_path):
    facts = {"clips": 5, "train": 8, "test": 8, "frames": 8, "size": 32, "fps": 12, "seed": 1}
    labels = {"motions": synthetic.MOTIONS, "appearances": synthetic.APPEARANCES, "renderer": "03ed3bdf7855b7ef"}
    write(tmp_path / "new")
    (tmp_path / "old").mkdir()
    for name in ("pretrain", "labelled"):
        (tmp_path / "old" / name).mkdir()
    (tmp_path / "old" / "settings.json").write_text(json.dumps(facts | labels, indent=1) + "\n")
    write(tmp_path / "old")
    assert contents(tmp_path / "old") == contents(tmp_path / "new")


def test_a_misspelt_option_is_no_abbreviation_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generated", "--folder", str(tmp_path / "clips"), "--clip", "3"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "unrecognized arguments: --clip 3" in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()
