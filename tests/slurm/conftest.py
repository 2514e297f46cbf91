"""A cluster, a checkout, clips, and a pretraining of a few seconds that can be interrupted."""

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

ROOT = Path(__file__).parents[2]
STEPS = 30
COSTS: list[tuple[str, int, float, bool]] = []
"""Of each interruption: what it was, steps lost, seconds until the run ran again, and whether its end was the same."""


# Videos that one can make slow, or impossible to read for rank 1, while a job runs.
MOODY_DATASET = """
import os, time
from pathlib import Path
from tubelet.data import video_dataset

class Dataset(video_dataset.Dataset):
    def __getitem__(self, draw):
        moods = Path(self.data.datasets[0]).parent
        if (moods / "slow").exists():
            time.sleep(0.5)
        if (moods / "broken").exists() and os.environ.get("SLURM_PROCID") == "1":
            raise ValueError("this clip is broken")
        return super().__getitem__(draw)
"""


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory):
    """A disk of 24 MB. It is there before the cluster is, whose nodes would not see a later one."""
    if why := real.missing():
        pytest.skip(why)
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
    """A git checkout of the programs, where one may edit."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("app", "evals", "src", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (folder / "src" / "tubelet" / "data" / "moody_dataset.py").write_text(MOODY_DATASET)
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory, checkout):
    """Folder of generated clips: `pretrain/`, `motion_train.csv`, `motion_test.csv`."""
    folder = tmp_path_factory.mktemp("clips")
    sizes = {"clips": 24, "train": 16, "test": 16, "frames": 8, "size": 32, "processes": 1}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    run(checkout, "tubelet.data.generated", "--folder", str(folder), *words)
    return folder


@pytest.fixture(scope="session")
def fname(tmp_path_factory, clips):
    """YAML of a pretraining of STEPS steps, for two nodes with one process each."""
    raw = {
        "base": str(ROOT / "configs" / "pretrain" / "debug.yaml"),
        "data": {
            "dataset_type": "MoodyDataset",
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
    """YAML of a probe of that."""
    raw = {
        "base": str(ROOT / "configs" / "evals" / "demo.yaml"),
        "data": {
            "dataset_train": str(clips / "motion_train.csv"),
            "dataset_val": str(clips / "motion_test.csv"),
            "cache": str(clips / "decoded"),
            "frames_per_clip": 8,
        },
        "optimization": {"num_epochs": 2, "min_steps": 1, "batch_size": 8, "select": "val"},
        "pretrain": {"folder": "given by --then"},
    }
    path = Path(fname).with_name("probe.yaml")
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, checkout, fname):
    """Folder of the same run as two processes of this machine, without SLURM."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(checkout, "app.main", "--fname", fname, "--devices", "cpu", "--processes", "2", f"folder={folder}")
    return folder


@pytest.fixture
def site(cluster, checkout, fname, clips, tmp_path):
    """`Site` that leaves nothing in the queue."""
    place = Site(cluster, checkout, fname, clips, tmp_path / "run")
    yield place
    for mood in ("slow", "broken"):
        place.mood(mood, False)
    left = cluster.ask("squeue -h -t PD,CF,R,S,RQ -o %i/%T")
    cluster.ask("scancel --user=root")
    wait_for("an empty queue", lambda: not cluster.ask("squeue -h"), place.told)
    assert not left, "something was left in the queue"


def pytest_terminal_summary(terminalreporter):
    if COSTS:
        terminalreporter.section("what interruptions cost")
    for what, lost, seconds, same in COSTS:
        end = "the same parameters bit for bit" if same else "OTHER PARAMETERS"
        terminalreporter.write_line(f"{what:<28} {lost:>2} steps lost, runs again after {seconds:4.1f} s, {end}")


class Site:
    """What a user does on the cluster with the run folder `folder`, and what he sees."""

    def __init__(self, cluster: real.Cluster, checkout: Path, fname: str, clips: Path, folder: Path):
        self.cluster, self.checkout, self.fname, self.clips, self.folder = cluster, checkout, fname, clips, folder

    def mood(self, name: str, present: bool) -> None:
        """`slow`: from now on clips take their time; `broken`: rank 1 cannot read any."""
        if present:
            (self.clips / name).touch()
        else:
            (self.clips / name).unlink(missing_ok=True)

    def launch(self, *words: str, package: str = "app") -> str:
        """What `main_distributed` prints."""
        return run(self.checkout, f"{package}.main_distributed", *words, env=self.cluster.environment)

    def submit(self, *words: str) -> str:
        """Submit the tiny pretraining in `folder`; returns the job's id."""
        return self.launch("--fname", self.fname, "--folder", str(self.folder), *words).split()[0]

    def state(self, job: str) -> str:
        said = self.cluster.ask(f"sacct -X -n -P -o State -j {job}")
        return said.split()[0] if said else "UNKNOWN"

    def wait_for_state(self, job: str, *states: str) -> None:
        wait_for(f"{job} to be {' or '.join(states)}", lambda: self.state(job) in states, self.told)

    def wait_for_step(self, step: int) -> None:
        wait_for(f"step {step}", lambda: last_step(self.folder) >= step, self.told)

    def wait_for_start(self, job: str, number: int) -> float:
        """Seconds since the epoch when start `number` of the job began."""
        path = self.folder / "slurm" / f"{job}_started-{number}.json"
        wait_for(f"start {number} of job {job}", lambda: path.is_file() and path.stat().st_size, self.told)
        return yaml.safe_load(path.read_text())["time"]

    def interrupted(self, *words: str, at: int = 5) -> str:
        """Submit, and return the job's id when it has taken some steps; the next ones will be slow."""
        self.mood("slow", True)
        job = self.submit(*words)
        self.wait_for_step(at)
        return job

    def goes_on(self, job: str, what: str, since: float, as_if: Path) -> int:
        """The job starts again by itself and ends as the run in `as_if`; returns how many steps were lost."""
        seconds = self.wait_for_start(job, 1) - since
        lost = last_step(self.folder) - newest_step(self.folder)  # it has not yet opened the folder
        self._ends(job, what, lost, seconds, as_if)
        return lost

    def continues_with_the_same_command(self, what: str, as_if: Path) -> int:
        """Submitted again, the run goes on and ends as the one in `as_if`; returns how many steps were lost."""
        lost, since = self.lost_steps(), time.time()
        job = self.submit()
        seconds = self.wait_for_start(job, 0) - since
        self._ends(job, f"{what}, submitted again", lost, seconds, as_if)
        return lost

    def _ends(self, job: str, what: str, lost: int, seconds: float, as_if: Path) -> None:
        self.mood("slow", False)
        self.wait_for_state(job, "COMPLETED")
        same = same_parameters(self.folder, as_if)
        COSTS.append((what, lost, seconds, same))
        assert same

    def lost_steps(self) -> int:
        """Steps that the log has and the newest checkpoint has not, once nothing runs."""
        wait_for("the end of all processes", lambda: not self.cluster.ask("squeue -h -t R,CG -o %i"), self.told)
        return last_step(self.folder) - newest_step(self.folder)

    def told(self) -> str:
        logs = sorted((self.folder / "slurm").glob("*_log.err"))
        return self.cluster.ask("squeue") + "".join(f"\n{path}:\n{path.read_text()[-3000:]}" for path in logs)


def run(folder: Path, module: str, *words: str, env: dict[str, str] | None = None) -> str:
    """What `python -m module` prints, run in the checkout `folder`."""
    env = (env or dict(os.environ)) | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    # Compiled once: many short jobs, on a machine that may keep no compiled files, would spend their time on that.
    env |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder.parent / "compiled")}
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def wait_for(what: str, there: Callable[[], Any], told: Callable[[], str]) -> None:
    until = time.monotonic() + 240
    while not there():
        if time.monotonic() > until:
            pytest.fail(f"waited for {what} in vain\n{told()}")
        time.sleep(0.1)


def last_step(folder: Path) -> int:
    """Of the whole lines in the log."""
    path = folder / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return yaml.safe_load(lines[-1])["step"] if lines else 0


def newest_step(folder: Path) -> int:
    names = [path.stem for path in (folder / "checkpoints").glob("step-*.pt")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def same_parameters(folder: Path, other: Path) -> bool:
    """Are the last checkpoints equal bit for bit, with their optimisers?"""
    first, second = (
        torch.load(where / "checkpoints" / "latest.pt", weights_only=True, map_location="cpu")
        for where in (folder, other)
    )
    tensors = [list(_tensors({**state, "config": None})) for state in (first, second)]
    assert first["step"] == second["step"] == STEPS
    return len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))


def _tensors(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value)
