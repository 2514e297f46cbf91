"""A data set of synthetic clips as real video files (mp4, h264), for the demo and for trying an idea without data.

    python -m tubelet.data.generated --folder runs/demo/clips

writes `pretrain/*.mp4` without labels, `labelled/*.mp4`, and the lists `motion_train.csv`, `motion_test.csv`,
`appearance_train.csv` and `appearance_test.csv`: the same labeled clips with either of their two labels. The same
arguments give the same files, byte for byte. An interrupted run continues with the missing files.
"""

import argparse
import functools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tubelet.config import UserError
from tubelet.data import synthetic
from tubelet.data.generated_files import begin, encode, finish, write_missing
from tubelet.runtime import command_line
from tubelet.runtime.seeds import Purpose, numpy_generator


@dataclass(frozen=True)
class Settings:
    """The files are a pure function of these and of the renderer."""

    clips: int = 4000
    """Clips without labels."""
    train: int = 800
    test: int = 800
    frames: int = 16
    size: int = 64
    fps: int = 12
    seed: int = 0


@dataclass(frozen=True)
class Clip:
    """A file of the data set. split: 0 pretrain, 1 train, 2 test."""

    path: Path
    split: int
    number: int
    motion: int
    appearance: int


def write_dataset(folder: Path, settings: Settings, processes: int) -> None:
    """Write the missing files of the data set in `folder`.

    Raises:
        ConfigError: The folder holds a data set with other settings.
    """
    facts = {
        **asdict(settings),
        "motions": list(synthetic.MOTIONS),
        "appearances": list(synthetic.APPEARANCES),
        "renderer": synthetic.RENDERER,
    }
    if begin(folder, facts, ["pretrain", "labelled"]):
        return
    clips = plan(folder, settings)
    write_missing(clips, lambda clip: clip.path, functools.partial(_write_clip, settings), processes, "clip")
    _write_lists(folder, clips)
    finish(folder)


def plan(folder: Path, settings: Settings) -> list[Clip]:
    """All clips. Among the labeled ones, motions and appearances are balanced, and their pairs nearly so."""
    motions, appearances = len(synthetic.MOTIONS), len(synthetic.APPEARANCES)
    rng = numpy_generator(settings.seed, Purpose.GENERATED_LABELS)
    clips = [
        Clip(folder / "pretrain" / f"{number:06}.mp4", 0, number, int(motion), int(appearance))
        for number, (motion, appearance) in enumerate(
            zip(rng.integers(motions, size=settings.clips), rng.integers(appearances, size=settings.clips), strict=True)
        )
    ]
    for split, (name, amount) in enumerate((("train", settings.train), ("test", settings.test)), start=1):
        for number in range(amount):
            path = folder / "labelled" / f"{name}_{number:06}.mp4"
            clips.append(Clip(path, split, number, number % motions, (number + number // motions) % appearances))
    return clips


def _write_clip(settings: Settings, clip: Clip) -> None:
    rng = numpy_generator(settings.seed, Purpose.GENERATED_CLIP, clip.split, clip.number)
    frames = synthetic.render_clip(rng, clip.motion, clip.appearance, settings.frames, settings.size)
    encode(frames, clip.path, settings.fps)


def _write_lists(folder: Path, clips: list[Clip]) -> None:
    for split, name in ((1, "train"), (2, "test")):
        for label in ("motion", "appearance"):
            of_split = [clip for clip in clips if clip.split == split]
            lines = [f"{clip.path.relative_to(folder)} {getattr(clip, label)}\n" for clip in of_split]
            (folder / f"{label}_{name}.csv").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=command_line.typed("tubelet.data.generated"),
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,  # a misspelt option is an error, not another one
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    helps = {
        "clips": "clips without labels",
        "train": "labeled clips for training a probe",
        "test": "labeled clips for testing it",
        "frames": "frames per clip",
        "size": "height and width in pixels",
        "fps": "frames per second",
        "seed": "seed of all draws",
    }
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{helps[name]} (default: {default})")
    args = vars(parser.parse_args())
    folder, processes = args.pop("folder"), args.pop("processes")
    try:
        write_dataset(folder, Settings(**args), processes)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
