from collections import Counter

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data import synthetic
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.generated import Settings, plan, write_dataset
from tubelet.data.randomness import Purpose, generator
from tubelet.data.sources import VIDEO_SUFFIXES, read_source

SETTINGS = Settings(clips=5, train=8, test=8, frames=8, size=32, seed=1)


def write(folder, settings=SETTINGS, processes=1):
    labels = synthetic.MOTIONS, synthetic.APPEARANCES
    write_dataset(folder, synthetic.render_clip, settings, *labels, processes)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_bytes_again_and_after_an_interruption(tmp_path):
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
    with pytest.raises(ConfigError, match=r"holds clips made differently \(frames, seed\)"):
        write(tmp_path / "one", Settings(clips=5, train=8, test=8, frames=10, size=32, seed=2))


def test_files_show_what_was_rendered_and_lists_name_it(tmp_path):
    write(tmp_path)
    motion = read_source(str(tmp_path / "motion_train.csv"), VIDEO_SUFFIXES)
    appearance = read_source(str(tmp_path / "appearance_train.csv"), VIDEO_SUFFIXES)
    assert motion.paths == appearance.paths
    assert len(read_source(str(tmp_path / "pretrain"), VIDEO_SUFFIXES).paths) == 5
    for number in (0, 5):
        video = open_video(motion.paths[number], "decord")
        assert video.fps == 12
        frames = read_frames(video, np.arange(8), motion.paths[number])
        rng = generator(1, Purpose.GENERATED_CLIP, 1, number)
        rendered = synthetic.render_clip(rng, motion.labels[number], appearance.labels[number], 8, 32)
        brightness = np.array([0.299, 0.587, 0.114])  # 4:2:0 averages the colours of four pixels, not their brightness
        assert np.abs((frames.astype(int) - rendered) @ brightness).mean() < 10


def test_labels_are_balanced(tmp_path):
    clips = [clip for clip in plan(tmp_path, Settings(), 8, 8) if clip.split == 1]
    assert set(Counter(clip.motion for clip in clips).values()) == {100}
    assert set(Counter(clip.appearance for clip in clips).values()) == {100}
    assert set(Counter((clip.motion, clip.appearance) for clip in clips).values()) == {12, 13}
