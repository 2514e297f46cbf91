"""A small set of generated clips as real video files (mp4, h264), for the demo and for trying an idea without data.

    python -m tubelet.data.generated --folder runs/demo/clips

writes `pretrain/*.mp4` without labels, `labelled/*.mp4`, and the lists `motion_train.csv`, `motion_test.csv`,
`appearance_train.csv`, `appearance_test.csv`: the same labelled clips under their two labels. The same arguments give
the same files, byte for byte. Run again, it makes only what is missing.
"""

import argparse
import functools
import hashlib
import inspect
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np

from tubelet.config import ConfigError, UserError
from tubelet.data import synthetic
from tubelet.data.randomness import Purpose, generator
from tubelet.runtime.progress import progress

# (rng, motion, appearance, num_frames, size) -> uint8 [T, H, W, 3]
Render = Callable[[np.random.Generator, int, int, int, int], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What the files are a pure function of, together with the renderer."""

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
    """One file to be made. split: 0 pretrain, 1 train, 2 test."""

    path: Path
    split: int
    number: int
    motion: int
    appearance: int


def write_dataset(
    folder: Path,
    render: Render,
    settings: Settings,
    motions: tuple[str, ...],
    appearances: tuple[str, ...],
    processes: int,
) -> None:
    """Make what is missing of the set in `folder`. Raises ConfigError when it holds a set of other settings."""
    source = hashlib.sha256(inspect.getsource(inspect.getmodule(render)).encode()).hexdigest()[:16]
    facts = {**asdict(settings), "motions": motions, "appearances": appearances, "renderer": source}
    if _begin(folder, json.loads(json.dumps(facts))):
        return
    clips = plan(folder, settings, len(motions), len(appearances))
    missing = [clip for clip in clips if not clip.path.exists()]
    make = functools.partial(_make, render, settings)
    with multiprocessing.Pool(processes) as pool:
        made = pool.imap_unordered(make, missing, chunksize=8)
        for _ in progress(made, desc="clips", total=len(clips), initial=len(clips) - len(missing), unit="clip"):
            pass
    _write_lists(folder, clips)
    (folder / "finished").touch()


def plan(folder: Path, settings: Settings, motions: int, appearances: int) -> list[Clip]:
    """All clips. Labelled ones meet every motion and every appearance equally often, and their pairs nearly so."""
    rng = generator(settings.seed, Purpose.GENERATED_LABELS)
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


def encode(frames: np.ndarray, path: Path, fps: int) -> None:
    """uint8 [T, H, W, 3] as mp4, h264, 4:2:0 with even sides; the file appears only when it is complete."""
    unfinished = path.with_suffix(".part")
    with av.open(str(unfinished), "w", format="mp4") as container:
        # x264's macroblock tree looks at memory beyond small pictures: the bytes would differ from run to run.
        options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the number of threads changes the bytes
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    unfinished.replace(path)


def _begin(folder: Path, facts: dict) -> bool:
    """Note in `folder` what it will hold; whether it holds all of it already."""
    note = folder / "settings.json"
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != facts:
            keys = ", ".join(key for key in facts if found.get(key) != facts[key])
            raise ConfigError(f"{folder} holds clips made differently ({keys}); remove it or choose another --folder")
        return (folder / "finished").exists()
    for name in ("pretrain", "labelled"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return False


def _make(render: Render, settings: Settings, clip: Clip) -> None:
    rng = generator(settings.seed, Purpose.GENERATED_CLIP, clip.split, clip.number)
    encode(render(rng, clip.motion, clip.appearance, settings.frames, settings.size), clip.path, settings.fps)


def _write_lists(folder: Path, clips: list[Clip]) -> None:
    for split, name in ((1, "train"), (2, "test")):
        for label in ("motion", "appearance"):
            chosen = [clip for clip in clips if clip.split == split]
            lines = [f"{clip.path.relative_to(folder)} {getattr(clip, label)}\n" for clip in chosen]
            (folder / f"{label}_{name}.csv").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tubelet.data.generated", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    helps = {
        "clips": "clips without labels",
        "train": "labelled clips to train a probe",
        "test": "labelled clips to test it",
        "frames": "frames of a clip",
        "size": "height and width, pixels",
        "fps": "frames a second",
        "seed": "",
    }
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{helps[name]} (default {default})")
    arguments = vars(parser.parse_args())
    folder, processes = arguments.pop("folder"), arguments.pop("processes")
    try:
        write_dataset(
            folder, synthetic.render_clip, Settings(**arguments), synthetic.MOTIONS, synthetic.APPEARANCES, processes
        )
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
