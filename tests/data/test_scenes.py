import csv
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace

import av
import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.scenes import language, rendering
from tubelet.data.scenes.generate import Settings, main, plan, write_dataset
from tubelet.data.scenes.scene import ATTRIBUTES, EVENT_DURATION, HELD_OUT, Scene, draw_scenes

SETTINGS = Settings(pretrain=2, train=6, test=3, test_combinations=2, sounding_train=4, sounding_test=2, size=32)
SCENE = Scene("two", "red", "disc", "right", "stays still", "flash", "swell")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, SETTINGS, processes=1)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_are_identical_for_any_number_of_processes_and_after_an_interruption(folder, tmp_path):
    write_dataset(tmp_path, SETTINGS, processes=2)
    assert contents(tmp_path) == contents(folder)
    for name in ("finished", "captions_test.json", "videos/test_000001.mp4"):
        (tmp_path / name).unlink()
    write_dataset(tmp_path, SETTINGS, processes=1)
    assert contents(tmp_path) == contents(folder)
    with pytest.raises(ConfigError, match=r"holds clips with other settings \(seed\)"):
        write_dataset(tmp_path, Settings(**{**vars(SETTINGS), "seed": 1}), processes=1)


def test_captions_say_all_attributes():
    assert language.caption(SCENE, 0) == (
        "two red discs drift right while the camera stays still, flash and then swell"
    )
    single = Scene("one", "blue", "cross", "up", "zooms in", "blink", "flash")
    assert language.caption(single, 1) == "the camera zooms in as one blue cross drifts up; it blinks, then flashes"
    for scene in draw_scenes(np.random.default_rng(0), 100):
        assert {language.parse(language.caption(scene, template)) for template in (0, 1)} == {scene}
    assert language.parse("two red discs drift right") is None


def test_held_out_pairs_are_in_one_split_only():
    for video in plan(Settings()):
        if video.scene is not None:
            held_out = (video.scene.color, video.scene.shape) in HELD_OUT
            assert held_out == (video.split == "test_combinations")


def test_attributes_are_balanced_and_independent():
    scenes = draw_scenes(np.random.default_rng(0), 4800)
    for name, values in ATTRIBUTES.items():
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(values)
        assert max(counts.values()) == min(counts.values())
    for one, other in (("count", "direction"), ("color", "camera"), ("direction", "first")):
        expected = len(scenes) / len(ATTRIBUTES[one]) / len(ATTRIBUTES[other])
        counts = Counter((getattr(s, one), getattr(s, other)) for s in scenes)
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 30  # chi-square, at most 9 degrees


def test_without_the_video_no_answer_is_more_probable_than_another():
    rng = np.random.default_rng(0)
    answers = defaultdict(Counter)
    for scene in draw_scenes(rng, 2400):
        for question in language.questions(rng, scene):
            assert question.answer in question.options
            text = (
                question.text
                if question.type != "order"
                else " ".join(sorted(re.findall("flash|blink|swell", question.text)))
            )
            answers[question.type, text][question.answer] += 1
            answers[question.type, "position"][question.options.index(question.answer)] += 1
    assert {kind for kind, _ in answers} == set(language.QUESTION_TYPES)
    for counts in answers.values():
        share = 1 / len(counts)
        assert max(counts.values()) / counts.total() < share + 4 * (share * (1 - share) / counts.total()) ** 0.5


def test_frames_show_the_attributes():
    sprites, _ = rendering.place(np.random.default_rng(1), SCENE)
    sprites = [replace(sprite, middle=(0.5, y)) for sprite, y in zip(sprites, (0.3, 0.7), strict=True)]
    frames = rendering.render_frames(np.random.default_rng(2), sprites, "stays still", 24, 64).astype(int)
    red = (frames[..., 0] > 180) & (frames[..., 1] < 110)
    white = frames.min(-1) > 220
    x = [np.nonzero(mask)[1].mean() for mask in red if mask.any()]
    assert x[-1] - x[0] == pytest.approx(0.36 * 64, abs=2.5)
    first, second = (onset for onset, _ in sprites[0].events)
    times = (np.arange(24) + 0.5) / 8
    np.testing.assert_array_equal(white.any((1, 2)), (first <= times) & (times < first + EVENT_DURATION))
    area = red.sum((1, 2))
    swollen = (second <= times) & (times < second + EVENT_DURATION)
    assert area[swollen].min() > 1.8 * np.median(area)


def test_a_zoom_changes_the_size_of_the_sprites():
    sprites, _ = rendering.place(
        np.random.default_rng(1), Scene("one", "red", "disc", "left", "zooms in", "flash", "blink")
    )
    sprites = [replace(sprites[0], middle=(0.5, 0.5))]  # inside of the picture throughout
    for camera, larger in (("zooms in", True), ("zooms out", False)):
        frames = rendering.render_frames(np.random.default_rng(2), sprites, camera, 24, 64).astype(int)
        area = ((frames[..., 0] > 180) & (frames[..., 1] < 110)).sum((1, 2))
        ratio = area[-1] / area[0]
        assert ratio > 1.8 if larger else ratio < 0.55


def test_a_tone_sounds_when_and_where_its_event_is_seen(folder):
    """The sound that is read back from the file, against the sprites."""
    video = next(video for video in plan(SETTINGS) if video.split == "sounding_test")
    with av.open(str(folder / "videos" / f"{video.name}.mp4")) as container:
        assert container.streams.audio[0].rate == rendering.SAMPLE_RATE
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
    sound = np.concatenate(parts, axis=1)
    loud = np.abs(sound).mean(1)
    with av.open(str(folder / "videos" / f"{video.name}.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    color = np.array(rendering.COLORS[ATTRIBUTES["color"][video.label]])
    near = np.abs(frame - color).max(-1) < 60
    on_the_right = np.nonzero(near)[1].mean() > 16
    assert (loud[1] > loud[0]) == on_the_right


def test_the_sound_begins_with_the_event():
    _, tones = rendering.place(np.random.default_rng(3), SCENE)
    sound = rendering.render_sound(np.random.default_rng(0), tones)
    loud = np.abs(sound).max(0) > 0.1
    times = np.nonzero(loud)[0] / rendering.SAMPLE_RATE
    assert times[0] == pytest.approx(tones[0].onset, abs=0.01)
    gap = np.diff(times).argmax()
    assert times[gap + 1] == pytest.approx(tones[1].onset, abs=0.01)


def test_lists_name_the_videos(folder):
    names = {path.stem for path in (folder / "videos").iterdir()}
    captions = json.loads((folder / "captions_train.json").read_text())
    assert [video["video_id"] for video in captions["videos"]] == [f"train_{i:06}" for i in range(6)]
    assert len(captions["sentences"]) == 12
    scenes = {s["video_id"]: language.parse(s["caption"]) for s in captions["sentences"]}
    asked = json.loads((folder / "questions_train.json").read_text())
    with open(folder / "choices_train.csv", newline="") as file:
        choices = list(csv.DictReader(file))
    assert len(asked) == len(choices) == 36
    for question, choice in zip(asked, choices, strict=True):
        assert question["video_id"] == choice["video"]
        assert question["video_id"] in names
        assert choice[f"a{choice['answer']}"] == question["answer"]
        attribute = {"order": "first"}.get(question["type"], question["type"])
        assert question["answer"] == getattr(scenes[question["video_id"]], attribute)
    assert (folder / "sounding_train.csv").read_text().splitlines()[1] == "videos/sounding_train_000001.mp4 1"
    assert (folder / "videos_test.csv").read_text() == "".join(f"videos/test_{i:06}.mp4\n" for i in range(3))
    video = open_video(str(folder / "videos" / "train_000000.mp4"), "pyav")
    assert (video.num_frames, video.fps) == (24, 8)
    assert read_frames(video, np.arange(24), "train_000000.mp4").shape == (24, 32, 32, 3)


def test_a_misspelt_option_is_no_abbreviation_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate", "--folder", str(tmp_path / "scenes"), "--pretr", "3"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "unrecognized arguments: --pretr 3" in capsys.readouterr().err
    assert not (tmp_path / "scenes").exists()
