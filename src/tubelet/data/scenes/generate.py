"""Write a data set of described scenes as real video files with sound (mp4, h264, AAC).

    python -m tubelet.data.scenes.generate --folder runs/language/scenes

writes `videos/*.mp4` and lists of the splits `pretrain` (without descriptions), `train`, `test` and
`test_combinations`, whose pairs of color and shape no other split has:

    pretrain.csv, videos_<split>.csv paths
    captions_<split>.json            captions, as in MSR-VTT: {"videos": […], "sentences": […]}
    questions_<split>.json           open-ended questions, as in MSRVTT-QA: [{"video_id", "question", "answer", …}]
    choices_<split>.csv              multiple choice, as in NExT-QA: video, question, answer, qid, type, a0, a1, …
    sounding_{train,test}.csv        `path label`: the color of that one of two sprites which is heard, on the left or
                                     on the right. Neither the pictures nor the sound alone tell it.

The same arguments give the same files, byte for byte. An interrupted run continues with the missing files.
"""

import argparse
import csv
import functools
import io
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tubelet.config import UserError
from tubelet.data.generated_files import begin, encode, finish, write_missing
from tubelet.data.scenes import language, rendering
from tubelet.data.scenes.scene import ATTRIBUTES, DURATION, Scene, draw_scenes
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.seeds import Purpose, numpy_generator

DESCRIBED = ("train", "test", "test_combinations")


@dataclass(frozen=True)
class Settings:
    """The files are a pure function of these and of the renderer."""

    pretrain: int = 3000
    """Videos without descriptions."""
    train: int = 3000
    test: int = 500
    test_combinations: int = 500
    sounding_train: int = 1000
    sounding_test: int = 400
    size: int = 64
    """Height and width in pixels."""
    fps: int = 8
    sound: bool = True
    """Whether the files have sound, whose encoding takes longer than that of the pictures."""
    seed: int = 0


@dataclass(frozen=True)
class Video:
    """A file of the data set. scene: what it shows; None for two sprites of which one is heard, `label` its color."""

    split: str
    number: int
    scene: Scene | None
    label: int = -1

    @property
    def name(self) -> str:
        return f"{self.split}_{self.number:06}"

    @property
    def described_scene(self) -> Scene:
        assert self.scene is not None
        return self.scene


def plan(settings: Settings) -> list[Video]:
    """Return all videos. The values of each attribute are equally frequent in each split."""
    videos = []
    for number, split in enumerate(("pretrain", *DESCRIBED)):
        rng = numpy_generator(settings.seed, Purpose.SCENE_ATTRIBUTES, number)
        scenes = draw_scenes(rng, getattr(settings, split), held_out=split == "test_combinations")
        videos += [Video(split, i, scene) for i, scene in enumerate(scenes)]
    for split in ("sounding_train", "sounding_test"):
        videos += [Video(split, i, None, i % len(ATTRIBUTES["color"])) for i in range(getattr(settings, split))]
    return videos


def write_dataset(folder: Path, settings: Settings, processes: int) -> None:
    """Write the missing files of the data set in `folder`.

    Raises:
        ConfigError: The folder holds a data set with other settings.
    """
    facts = {**asdict(settings), "attributes": {k: list(v) for k, v in ATTRIBUTES.items()}}
    facts["renderer"] = rendering.RENDERER
    if begin(folder, facts, ["videos"]):
        return
    videos = plan(settings)
    path, write = functools.partial(_file, folder), functools.partial(_write_video, folder, settings)
    write_missing(videos, path, write, processes, "video")
    _write_lists(folder, settings, videos)
    finish(folder)


def _file(folder: Path, video: Video) -> Path:
    return folder / "videos" / f"{video.name}.mp4"


def _rng(settings: Settings, purpose: Purpose, video: Video) -> np.random.Generator:
    splits = ("pretrain", *DESCRIBED, "sounding_train", "sounding_test")
    return numpy_generator(settings.seed, purpose, splits.index(video.split), video.number)


def _write_video(folder: Path, settings: Settings, video: Video) -> None:
    rng = _rng(settings, Purpose.SCENE, video)
    if video.scene is None:
        sprites, tones = _one_of_two(rng, video.label)
        camera = "stays still"
    else:
        sprites, tones = rendering.place(rng, video.scene)
        camera = video.scene.camera
    frames = rendering.render_frames(rng, sprites, camera, round(DURATION * settings.fps), settings.size)
    sound = rendering.render_sound(rng, tones) if settings.sound else None
    encode(frames, _file(folder, video), settings.fps, sound, rendering.SAMPLE_RATE)


def _one_of_two(rng: np.random.Generator, label: int) -> tuple[list[rendering.Sprite], list[rendering.Tone]]:
    """Place two sprites of different colors, on the left and on the right; the one with the color `label` is heard.

    It is heard on its side only.
    """
    colors = ATTRIBUTES["color"]
    other = int(rng.choice([i for i in range(len(colors)) if i != label]))
    sides = rng.permutation(2)  # of the sprite that is heard, and of the other one
    sprites = []
    for side, color in zip(sides.tolist(), (label, other), strict=True):
        middle = (0.25 + 0.5 * side + float(rng.uniform(-0.05, 0.05)), float(rng.uniform(0.35, 0.65)))
        shape = str(rng.choice(ATTRIBUTES["shape"]))
        direction = str(rng.choice(["up", "down"]))
        sprites.append(rendering.Sprite(colors[color], shape, float(rng.uniform(0.1, 0.13)), middle, direction))
    frequency = float(rng.choice(list(rendering.TONES.values())))
    tones = [rendering.Tone(float(rng.uniform(start, start + 0.6)), frequency, float(sides[0])) for start in (0.2, 1.7)]
    order = rng.permutation(2)
    return [sprites[i] for i in order], tones


def _write_lists(folder: Path, settings: Settings, videos: list[Video]) -> None:
    of_split = {split: [v for v in videos if v.split == split] for split in {v.split for v in videos}}
    write_atomic(folder / "pretrain.csv", "".join(f"videos/{v.name}.mp4\n" for v in of_split.get("pretrain", [])))
    for split in ("sounding_train", "sounding_test"):
        lines = [f"videos/{v.name}.mp4 {v.label}\n" for v in of_split.get(split, [])]
        write_atomic(folder / f"{split}.csv", "".join(lines))
    for split in DESCRIBED:
        described = of_split.get(split, [])
        write_atomic(folder / f"videos_{split}.csv", "".join(f"videos/{v.name}.mp4\n" for v in described))
        write_json(folder / f"captions_{split}.json", _captions(described))
        asked = [
            (v, q)
            for v in described
            for q in language.questions(_rng(settings, Purpose.QUESTIONS, v), v.described_scene)
        ]
        write_json(folder / f"questions_{split}.json", _open_ended(asked))
        write_atomic(folder / f"choices_{split}.csv", _multiple_choice(asked, settings))


def _captions(videos: list[Video]) -> dict[str, list]:
    """Return the captions in the format of MSR-VTT, one for each template."""
    sentences = [
        {"video_id": video.name, "caption": language.caption(video.described_scene, template)}
        for video in videos
        for template in range(len(language.TEMPLATES))
    ]
    return {
        "videos": [{"video_id": video.name, "split": video.split} for video in videos],
        "sentences": [{"sen_id": i, **sentence} for i, sentence in enumerate(sentences)],
    }


def _open_ended(asked: list[tuple[Video, language.Question]]) -> list[dict]:
    """Return the questions in the format of MSRVTT-QA, with their type."""
    return [
        {"id": i, "video_id": video.name, "question": q.text, "answer": q.answer, "type": q.type}
        for i, (video, q) in enumerate(asked)
    ]


def _multiple_choice(asked: list[tuple[Video, language.Question]], settings: Settings) -> str:
    """Return the questions in the format of NExT-QA; a question with fewer options has empty cells."""
    most = max((len(question.options) for _, question in asked), default=0)
    names = [f"a{i}" for i in range(most)]
    header = ["video", "frame_count", "width", "height", "question", "answer", "qid", "type", *names]
    frames = round(DURATION * settings.fps)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for i, (video, q) in enumerate(asked):
        options = [*q.options, *[""] * (most - len(q.options))]
        row = [video.name, frames, settings.size, settings.size, q.text, q.options.index(q.answer), i, q.type]
        writer.writerow([*row, *options])
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tubelet.data.scenes.generate",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,  # a misspelt option is an error, not another one
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    for name, default in asdict(Settings()).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(option, type=int, default=default, help=f"(default: {default})")
    args = vars(parser.parse_args())
    folder, processes = args.pop("folder"), args.pop("processes")
    try:
        write_dataset(folder, Settings(**args), processes)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
