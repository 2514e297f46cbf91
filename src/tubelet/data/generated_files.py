"""The files of generated data sets: the same settings give the same bytes, and an interrupted run can be continued."""

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np

from tubelet.config import ConfigError
from tubelet.runtime.files import read_json, replacing, write_json
from tubelet.runtime.progress import progress

File = TypeVar("File")


def begin(folder: Path, facts: dict[str, Any], subfolders: Iterable[str]) -> bool:
    """Create the folder of a data set with its `settings.json`; return whether the data set in it is complete.

    Args:
        folder: Folder of the data set.
        facts: Everything that the files depend on, as JSON types.
        subfolders: Folders to create in it.

    Raises:
        ConfigError: The folder holds a data set with other facts.
    """
    path = folder / "settings.json"
    if (existing := read_json(path)) is not None:
        if existing != facts:
            keys = ", ".join(key for key in facts if existing.get(key) != facts[key])
            raise ConfigError(f"{folder} holds clips with other settings ({keys}); remove it or choose another one")
        return (folder / "finished").exists()
    for name in subfolders:
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
    return False


def write_missing(
    files: Sequence[File], path: Callable[[File], Path], write: Callable[[File], None], processes: int, unit: str
) -> None:
    """Write the files that do not exist yet, in processes of their own.

    Args:
        files: Descriptions of all files of the data set.
        path: Returns the path of a file.
        write: Writes a file; it has to be picklable.
        processes: Number of processes.
        unit: What a file is, for the progress bar.
    """
    missing = [file for file in files if not path(file).exists()]
    with multiprocessing.Pool(processes) as pool:
        written = pool.imap_unordered(write, missing, chunksize=8)
        initial = len(files) - len(missing)
        for _ in progress(written, desc=f"{unit}s", total=len(files), initial=initial, unit=unit):
            pass


def finish(folder: Path) -> None:
    """Note that the data set is complete."""
    (folder / "finished").touch()


def encode(
    frames: np.ndarray, path: Path, fps: int, sound: np.ndarray | None = None, sample_rate: int = 16_000
) -> None:
    """Write an mp4 file, h264 4:2:0 and AAC. It gets its name only when it is complete.

    Args:
        frames: uint8 [T, H, W, 3], H and W even.
        path: File to write.
        fps: Frames per second.
        sound: float32 [2, samples] from -1 to 1; None for a file without sound.
        sample_rate: Samples of the sound per second.
    """
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        # x264's macroblock tree reads beyond the end of small pictures: the bytes would differ from run to run.
        options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
        video = container.add_stream("libx264", rate=fps, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1  # the number of threads changes the bytes
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=sample_rate, layout="stereo", options={"aac_coder": "fast"})
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout="stereo")
            samples.sample_rate, samples.pts, samples.time_base = sample_rate, 0, Fraction(1, sample_rate)
            container.mux(audio.encode(samples))
            container.mux(audio.encode(None))
