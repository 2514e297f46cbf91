"""A cluster, a checkout, clips, and a pretraining of a few seconds that tests interrupt."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.slurm import cluster as real
from tubelet.runtime import checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 30
COSTS: list[tuple[str, int, float, bool]] = []
"""Of each interruption: its name, lost steps, seconds until the run resumed, whether the parameters are the same."""


# Tests make its clips slow, or unreadable for rank 1, while a job runs.
TEST_DATASET = """
import os, time
from pathlib import Path
from tubelet.data import video_dataset

class Dataset(video_dataset.Dataset):
    def __getitem__(self, draw):
        folder = Path(self.data.datasets[0]).parent
        if (folder / "slow").exists():
            time.sleep(0.5)
        if (folder / "broken").exists() and os.environ.get("SLURM_PROCID") == "1":
            raise ValueError("this clip is broken")
        return super().__getitem__(draw)
"""


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory):
    """A disk of 24 MB. It is mounted before the cluster starts, as the nodes do not see later mounts."""
    if reason := real.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, small_disk):
    """The running test cluster."""
    with real.Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A git checkout of the programs, which tests may edit."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("app", "evals", "src", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (folder / "src" / "tubelet" / "data" / "switched_dataset.py").write_text(TEST_DATASET)
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory, checkout):
    """Folder of generated clips: `pretrain/`, `motion_train.csv`, `motion_test.csv`."""
    folder = tmp_path_factory.mktemp("clips")
    sizes = {"clips": 24, "train": 16, "test": 16, "frames": 8, "size": 32, "processes": 1}
    arguments = [argument for name, value in sizes.items() for argument in (f"--{name}", str(value))]
    run(checkout, "tubelet.data.generated", "--folder", str(folder), *arguments)
    return folder


@pytest.fixture(scope="session")
def fname(tmp_path_factory, clips):
    """YAML of a pretraining of STEPS steps, for two nodes with one process each."""
    raw = {
        "base": str(ROOT / "configs" / "pretrain" / "debug.yaml"),
        "data": {
            "dataset_type": "SwitchedDataset",
            "datasets": [str(clips / "pretrain")],
            "cache": str(clips / "decoded"),
            "batch_size": 2,
            "num_frames": 8,
        },
        "model": {"encoder_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}},
        "optimization": {"epochs": 2, "ipe": STEPS // 2},
        "logging": {"log_every": 1, "checkpoint_every_steps": 7, "monitor_clips": 0},
        "slurm": {"device": "cpu", "nodes": 2, "time": 60, "warn_seconds": 60},
    }
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.fixture(scope="session")
def probe_fname(fname, clips):
    """YAML of a probe of its encoder."""
    raw = {
        "base": str(ROOT / "configs" / "evals" / "demo.yaml"),
        "data": {
            "dataset_train": str(clips / "motion_train.csv"),
            "dataset_val": str(clips / "motion_test.csv"),
            "cache": str(clips / "decoded"),
            "frames_per_clip": 8,
        },
        "optimization": {"num_epochs": 2, "min_steps": 1, "batch_size": 8, "select": "val"},
        "pretrain": {"folder": "set by --then"},
    }
    path = Path(fname).with_name("probe.yaml")
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, checkout, fname):
    """Folder of the same run in two processes on this machine, without SLURM."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(checkout, "app.main", "--fname", fname, "--devices", "cpu", "--processes", "2", f"folder={folder}")
    return folder


@pytest.fixture
def site(cluster, checkout, fname, clips, tmp_path):
    """A `Site`. Fails a test that leaves jobs in the queue."""
    site = Site(cluster, checkout, fname, clips, tmp_path / "run")
    yield site
    for switch in ("slow", "broken"):
        site.switch(switch, False)
    remaining = cluster.command("squeue -h -t PD,CF,R,S,RQ -o %i/%T")
    cluster.command("scancel --user=root")
    wait_for("an empty queue", lambda: not cluster.command("squeue -h"), site.logs)
    assert not remaining, "there are jobs in the queue"


def pytest_terminal_summary(terminalreporter):
    if COSTS:
        terminalreporter.section("cost of interruptions")
    for what, lost, seconds, same in COSTS:
        result = "the same parameters bit for bit" if same else "OTHER PARAMETERS"
        terminalreporter.write_line(f"{what:<28} {lost:>2} steps lost, resumed after {seconds:4.1f} s, {result}")


class Site:
    """A user of the cluster with the run folder `folder`."""

    def __init__(self, cluster: real.Cluster, checkout: Path, fname: str, clips: Path, folder: Path):
        self.cluster, self.checkout, self.fname, self.clips, self.folder = cluster, checkout, fname, clips, folder

    def switch(self, name: str, on: bool) -> None:
        """`slow`: reading a clip takes 0.5 s; `broken`: rank 1 cannot read clips."""
        if on:
            (self.clips / name).touch()
        else:
            (self.clips / name).unlink(missing_ok=True)

    def launch(self, *arguments: str, package: str = "app") -> str:
        """The output of `main_distributed`."""
        return run(self.checkout, f"{package}.main_distributed", *arguments, env=self.cluster.environment)

    def submit(self, *arguments: str) -> str:
        """Submit the tiny pretraining in `folder`; returns the job's id."""
        return self.launch("--fname", self.fname, "--folder", str(self.folder), *arguments).split()[0]

    def state(self, job: str) -> str:
        output = self.cluster.command(f"sacct -X -n -P -o State -j {job}")
        return output.split()[0] if output else "UNKNOWN"

    def wait_for_state(self, job: str, *states: str) -> None:
        wait_for(f"{job} to be {' or '.join(states)}", lambda: self.state(job) in states, self.logs)

    def wait_for_step(self, step: int) -> None:
        wait_for(f"step {step}", lambda: last_step(self.folder) >= step, self.logs)

    def wait_for_start(self, job: str, number: int) -> float:
        """When attempt `number` of the job started, in seconds since the epoch."""
        path = self.folder / "slurm" / f"{job}_started-{number}.json"
        wait_for(f"start {number} of job {job}", lambda: path.is_file() and path.stat().st_size, self.logs)
        return yaml.safe_load(path.read_text())["time"]

    def submit_and_wait(self, *arguments: str, step: int = 5) -> str:
        """Submit a job with slow steps, and return its id after `step` of them."""
        self.switch("slow", True)
        job = self.submit(*arguments)
        self.wait_for_step(step)
        return job

    def assert_resumes(self, job: str, interruption: str, since: float, expected: Path) -> int:
        """The job is requeued and ends with the parameters of the run `expected`; returns the number of lost steps."""
        seconds = self.wait_for_start(job, 1) - since
        lost = last_step(self.folder) - newest_step(self.folder)  # it has not opened the folder yet
        self._assert_completes(job, interruption, lost, seconds, expected)
        return lost

    def assert_same_command_resumes(self, interruption: str, expected: Path) -> int:
        """Submitted again, the run ends with the parameters of `expected`; returns the number of lost steps."""
        lost, since = self.lost_steps(), time.time()
        job = self.submit()
        seconds = self.wait_for_start(job, 0) - since
        self._assert_completes(job, f"{interruption}, submitted again", lost, seconds, expected)
        return lost

    def _assert_completes(self, job: str, interruption: str, lost: int, seconds: float, expected: Path) -> None:
        self.switch("slow", False)
        self.wait_for_state(job, "COMPLETED")
        same = same_parameters(self.folder, expected)
        COSTS.append((interruption, lost, seconds, same))
        assert same

    def lost_steps(self) -> int:
        """Steps in the log after the newest checkpoint, when nothing runs any more."""
        wait_for("the end of all processes", lambda: not self.cluster.command("squeue -h -t R,CG -o %i"), self.logs)
        return last_step(self.folder) - newest_step(self.folder)

    def logs(self) -> str:
        """The queue and the end of the stderr of all jobs."""
        paths = sorted((self.folder / "slurm").glob("*_log.err"))
        return self.cluster.command("squeue") + "".join(f"\n{path}:\n{path.read_text()[-3000:]}" for path in paths)


def run(folder: Path, module: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """The output of `python -m module` in the checkout `folder`."""
    env = (env or dict(os.environ)) | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    # Keep compiled files even if the environment disables that: compiling would dominate many short jobs.
    env |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder.parent / "compiled")}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def wait_for(event: str, condition: Callable[[], Any], logs: Callable[[], str]) -> None:
    until = time.monotonic() + 240
    while not condition():
        if time.monotonic() > until:
            pytest.fail(f"timeout while waiting for {event}\n{logs()}")
        time.sleep(0.1)


def last_step(folder: Path) -> int:
    """The step of the last complete line in the log."""
    path = folder / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return yaml.safe_load(lines[-1])["step"] if lines else 0


def newest_step(folder: Path) -> int:
    return max(map(checkpoint.step_of, checkpoint.find(folder / "checkpoints")), default=0)


def same_parameters(folder: Path, other: Path) -> bool:
    """Whether the last checkpoints, with the optimizer state, are equal bit for bit."""
    first, second = (checkpoint.read(where / "checkpoints" / "latest") for where in (folder, other))
    tensors = [[*_tensors(state.weights), *_tensors(state.optimizer)] for state in (first, second)]
    assert first.metadata["step"] == second.metadata["step"] == STEPS
    return len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))


def _tensors(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value)
