"""Kills programs at random moments and compares what they do in the end with an undisturbed run.

    python -m tests.kills --kills 100 --seed 0 [--only train2 pack]

Each program is started again and again, as a user would, until it ends by itself. Programs are forks of this process,
which has imported torch already, so a start takes about a second.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml

from tests.evals.conftest import bar, write_video
from tests.processes import be_program
from tubelet.runtime import checkpoint
from tubelet.runtime.run_folder import read_log

PR_SET_CHILD_SUBREAPER = 36
SAVE_EVERY, STEPS = 5, 40
END_SECONDS = 120.0
"""Time after which a program that was killed counts as hanging; much longer than it takes, as machines may be busy."""
KINDS = ("SIGKILL", "SIGTERM", "SIGTERM to the group", "SIGKILL to the group", "Ctrl-C", "SIGTERM to a rank",
         "SIGKILL to a rank")  # fmt: skip


@dataclass
class Scenario:
    """A program, how its results are compared, and what a kill may cost it.

    Attributes:
        options: The YAML of a run in a folder.
        result: What must be equal in the end.
        check: Called after each kill with the folder, the kind and the exit status.
    """

    name: str
    module: str
    options: Callable[[Path], dict[str, Any]]
    result: Callable[[Path], Any]
    processes: int = 1
    check: Callable[[Path, str, int], None] = lambda folder, kind, status: None


@dataclass
class Outcome:
    kills: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Program:
    """`python -m <module> --fname <file>` in a fork with a session of its own."""

    def __init__(self, scenario: Scenario, fname: Path, log: Path):
        self.children_before = set(children_of(os.getpid()))
        self.log, self.status = log, None
        self.pid = os.fork()
        if self.pid == 0:
            processes = ["--processes", scenario.processes] if scenario.processes > 1 else []
            be_program(scenario.module, ["--fname", fname, "--devices", "cpu", *processes], log)

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, seconds: float) -> bool:
        """Wait until it and everything that it has started has ended. Returns whether that is so."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.poll() and not self.orphans():
                return True
            time.sleep(0.02)
        return False

    def orphans(self) -> list[int]:
        """Processes that it has left behind; this process adopts them."""
        left = set(children_of(os.getpid())) - self.children_before - {self.pid}
        for pid in list(left):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    left.discard(pid)
        return sorted(left)

    def send(self, kind: str, rng: random.Random) -> None:
        number = signal.SIGKILL if "SIGKILL" in kind else signal.SIGINT if kind == "Ctrl-C" else signal.SIGTERM
        target, send = self.pid, os.killpg if "group" in kind or kind == "Ctrl-C" else os.kill
        if "rank" in kind:
            ranks = [pid for pid in children_of(self.pid) if "resource_tracker" not in command_of(pid)]
            target = rng.choice(ranks) if ranks else self.pid
        with contextlib.suppress(ProcessLookupError):
            send(target, number)

    def end(self) -> None:
        """Kill it and everything that it has started."""
        for pid in [self.pid, *self.orphans()] if not self.poll() else self.orphans():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def command_of(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def torture(
    scenario: Scenario, folder: Path, kills: int, rng: random.Random, tell: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Kill a program so many times, at random moments, and compare its results with those of an undisturbed run."""
    outcome = Outcome()
    started = time.monotonic()
    straight = folder / "straight"
    program = start(scenario, straight)
    if not program.wait(10 * END_SECONDS) or program.status != 0:
        program.end()
        raise AssertionError(f"{scenario.name} fails undisturbed:\n{program.log.read_text()[-2000:]}")
    seconds = time.monotonic() - started
    expected = scenario.result(straight)
    run = 0
    while outcome.kills.total() < kills:
        disturbed = folder / f"disturbed-{run}"
        run += 1
        program = start(scenario, disturbed)
        while True:
            end_by_itself = rng.random() < 0.1 or outcome.kills.total() >= kills
            until = time.monotonic() + (10 * END_SECONDS if end_by_itself else rng.uniform(0, seconds))
            while time.monotonic() < until and not program.poll():
                time.sleep(0.005)
            if program.poll():
                break
            kind = rng.choice(KINDS if scenario.processes > 1 else KINDS[:5])
            program.send(kind, rng)
            outcome.kills[kind] += 1
            said = f"{scenario.name}, run {run}, kill {outcome.kills.total()} ({kind})"
            if not program.wait(END_SECONDS):
                left = {pid: command_of(pid)[:80] for pid in program.orphans()}
                outcome.problems.append(f"{said}: still running: {left}\n{program.log.read_text()[-1500:]}")
                program.end()
                program.wait(END_SECONDS)
            try:
                scenario.check(disturbed, kind, program.status or 0)
            except AssertionError as error:
                outcome.problems.append(f"{said}: exit status {program.status}: {error}")
            output = program.log.read_text(errors="replace")
            if "Traceback" in output and "to a rank" not in kind:
                outcome.problems.append(f"{said}: exit status {program.status}: a traceback\n{output[-3000:]}")
            tell(f"{said}: exit status {program.status}, {len(outcome.problems)} problems so far")
            program = start(scenario, disturbed)
        if not program.wait(END_SECONDS) or program.status != 0:
            outcome.problems.append(f"{scenario.name}, run {run}: the last start ended with {program.status}:\n"
                                    f"{program.log.read_text(errors='replace')[-2000:]}")  # fmt: skip
        elif (result := scenario.result(disturbed)) != expected:
            outcome.problems.append(f"{scenario.name}, run {run}: another result: {difference(expected, result)}")
    return outcome


def start(scenario: Scenario, folder: Path) -> Program:
    fname = folder.with_name(f"{folder.name}.yaml")
    fname.write_text(yaml.safe_dump(scenario.options(folder)))
    log = folder.with_name(f"{folder.name}.output")
    log.write_text("")
    return Program(scenario, fname, log)


def difference(expected: Any, result: Any) -> str:
    if isinstance(expected, dict) and isinstance(result, dict):
        keys = [key for key in sorted({*expected, *result}, key=str) if expected.get(key) != result.get(key)]
        return "; ".join(f"{key}: {str(expected.get(key))[:200]} != {str(result.get(key))[:200]}" for key in keys[:4])
    return f"{str(expected)[:300]} != {str(result)[:300]}"


# ---------------------------------------------------------------- programs


def scenarios(root: Path) -> list[Scenario]:
    """All programs, on videos that are written to `root`."""
    videos, lists = write_videos(root)
    return [
        Scenario("train1", "app.main", functools.partial(pretraining, videos), trained, 1, check_training),
        Scenario("train2", "app.main", functools.partial(pretraining, videos), trained, 2, check_training),
        Scenario("probe", "evals.main", functools.partial(probe, lists), results),
        Scenario("features", "evals.main", functools.partial(features, videos), digests),
        Scenario("index", "app.main", functools.partial(index, videos), indexed),
        Scenario("pack", "app.main", functools.partial(pack, lists), digests),
    ]


def write_videos(root: Path) -> tuple[Path, Path]:
    videos, lists = root / "videos", root / "lists"
    videos.mkdir()
    lists.mkdir()
    rng, rows = random.Random(0), []
    for number in range(24):
        path = videos / f"{number}.mp4"
        write_video(path, bar(number % 3, rng.randrange(32)))
        rows.append(f'"{path}" {number % 3}\n')
    (lists / "train.csv").write_text("".join(rows[:16]))
    (lists / "val.csv").write_text("".join(rows[16:]))
    return videos, lists


def pretraining(videos: Path, folder: Path) -> dict[str, Any]:
    mask = {"num_blocks": 1, "spatial_scale": [0.4, 0.4], "aspect_ratio": [1.0, 1.0]}
    clips = {"num_frames": 4, "tubelet_size": 2, "sampling_rate": 1, "crop_size": 32, "patch_size": 8}
    return {
        "app": "vjepa",
        "folder": str(folder),
        "data": {"datasets": [str(videos)], "batch_size": 4, "num_workers": 1, **clips},
        "mask": [mask],
        "encoder": {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "drop_rate": 0.1},
        "objective": {"predictor": {"depth": 1, "embed_dim": 24}},
        "optimization": {"epochs": 1, "ipe": STEPS, "warmup": 0, "lr": 1e-3},
        "meta": {"dtype": "float32", "seed": 3},
        "logging": {"log_every": 1, "checkpoint_every_steps": SAVE_EVERY, "monitor_clips": 0, "loggers": []},
    }


def trained(folder: Path) -> dict[Any, Any]:
    path = checkpoint.newest(folder / "checkpoints")
    weights = checkpoint.read_weights(path)
    tensors = [(part, name, weights[part][name]) for part in sorted(weights) for name in sorted(weights[part])]
    content = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, _, tensor in tensors)).hexdigest()
    losses = {line["step"]: line["loss"] for line in read_log(folder)}
    assert list(losses) == list(range(1, STEPS + 1)), "the log has not each step once"
    return {**losses, "step": checkpoint.step_of(path), "weights": content}


def check_training(folder: Path, kind: str, status: int) -> None:
    """A stop signal loses nothing; kills lose less than two intervals of checkpoints, as one is written meanwhile."""
    log = read_log(folder)
    last = log[-1]["step"] if log else 0
    path = checkpoint.newest(folder / "checkpoints")
    saved = 0 if path is None else checkpoint.step_of(path)
    assert saved <= last, f"saved step {saved}, logged step {last}"
    if status == 128 + signal.SIGTERM and "stopped after step" in folder.with_name(f"{folder.name}.output").read_text():
        assert saved == last, f"saved step {saved} of {last}"
    assert saved > last - 2 * SAVE_EVERY, f"saved step {saved} of {last}"


def probe(lists: Path, folder: Path) -> dict[str, Any]:
    return {
        "eval_name": "video_classification_frozen",
        "folder": str(folder),
        "data": {
            "dataset_train": str(lists / "train.csv"),
            "dataset_val": str(lists / "val.csv"),
            "num_classes": 3,
            "frames_per_clip": 4,
            "frame_step": 1,
            "num_segments": 2,
            "num_workers": 1,
            "cache_features": True,
        },
        "optimization": {
            "resolution": 32,
            "batch_size": 8,
            "num_epochs": 20,
            "heads": {"lr": [1e-3, 1e-2], "weight_decay": [0.01, 0.1]},
        },
        "pretrain": {**RANDOM_ENCODER},
        "meta": {"save_every_minutes": 0.002},
    }


RANDOM_ENCODER = {
    "checkpoint": "random",
    "encoder": {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2},
    "patch_size": 8,
}


def results(folder: Path) -> dict[str, Any]:
    measured = json.loads((folder / "results.json").read_text())
    measured.pop("seconds")
    return {**measured, "predictions": (folder / "predictions.csv").read_text(), "log": read_log(folder)}


def features(videos: Path, folder: Path) -> dict[str, Any]:
    return {
        "eval_name": "features",
        "folder": str(folder),
        "pretrain": {**RANDOM_ENCODER},
        "data": {
            "datasets": [str(videos)],
            "frames_per_clip": 4,
            "frame_step": 1,
            "num_segments": None,
            "resolution": 32,
            "num_workers": 1,
        },
        "features": ["mean", "slots"],
        "batch_size": 4,
        "videos_per_part": 3,
    }


def index(videos: Path, folder: Path) -> dict[str, Any]:
    return {
        "app": "index",
        "folder": str(folder),
        "data": {"datasets": [str(videos)]},
        "processes": 2,
        "part_size": 4,
        "thumbnails": 2,
    }


def indexed(folder: Path) -> dict[str, Any]:
    assert (folder / "index.html").is_file()
    assert not (folder / "index.parquet.work").exists()
    return {"rows": pq.read_table(folder / "index.parquet").to_pylist()}


def pack(lists: Path, folder: Path) -> dict[str, Any]:
    return {
        "app": "pack",
        "folder": str(folder),
        "data": {"datasets": [str(lists / "train.csv"), str(lists / "val.csv")]},
        "videos_per_shard": 4,
        "processes": 2,
        "encoding": {"short_side": 16, "options": {"preset": "ultrafast", "tune": "fastdecode"}},
        "verification": {"min_psnr": 1.0},
    }


def digests(folder: Path) -> dict[str, str]:
    """Digest of each file; one that a kill has left behind makes a difference."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adopt_orphans() -> None:
    """Let processes whose parent has ended become children of this one, so that they are noticed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train1 train2 probe features index pack")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adopt_orphans()
    tell = functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [s for s in scenarios(Path(folder)) if not arguments.only or s.name in arguments.only]
        for number, scenario in enumerate(chosen):
            kills = len(range(number, arguments.kills, len(chosen)))
            where = Path(folder) / scenario.name
            where.mkdir()
            started = time.monotonic()
            outcome = torture(scenario, where, kills, random.Random(f"{arguments.seed} {scenario.name}"), tell)
            seconds, count = time.monotonic() - started, outcome.kills.total()
            print(f"{scenario.name}: {count} kills in {seconds:.0f} s, {dict(outcome.kills)}", flush=True)
            for problem in outcome.problems:
                print(f"PROBLEM {problem}", flush=True)


if __name__ == "__main__":
    main()
