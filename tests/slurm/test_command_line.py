"""What is submitted, and what is refused before it is; no cluster is needed for this."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tubelet.config import ConfigError
from tubelet.runtime import distributed
from tubelet.runtime.launch import Package
from tubelet.slurm import cluster, requeue, snapshot, status
from tubelet.slurm.attempts import Attempt
from tubelet.slurm.cluster import Node
from tubelet.slurm.command_line import run
from tubelet.slurm.options import SlurmConfig
from tubelet.slurm.submit import Submitted

PROGRAMS = Package("app", key="app", module="train")
KNOWN = [Node("main", f"n{i}", "127.0.0.1", cpus=16, gpus=8, minutes=60) for i in range(4)]


@pytest.fixture
def fname(tmp_path):
    """YAML of a pretraining with a section `slurm`."""
    base = Path("configs/pretrain/debug.yaml").absolute()
    own = {"nodes": 2, "tasks_per_node": 4, "partition": "main", "time": 100, "mem_per_gpu": "40G"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "folder": str(tmp_path / "run"), "slurm": own}))
    return str(path)


@pytest.fixture
def dry_run(fname, capsys):
    """`dry_run(words…)` -> what is printed for the file."""

    def call(*words):
        run(PROGRAMS, ["--fname", fname, "--dry-run", *words], then="evals.main")
        return capsys.readouterr().out

    return call


def refused(words, capsys):
    """The message that the command line gives."""
    with pytest.raises(SystemExit) as stop:
        run(PROGRAMS, words, then="evals.main")
    return str(stop.value) + capsys.readouterr().err


def pretend(folder, monkeypatch, **commands):
    """Put shell scripts in the place of SLURM's commands."""
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_command_line_wins_over_the_file(dry_run, tmp_path):
    said = dry_run("--nodes", "3", "--mem-per-gpu", "80G", "--exclude", "n7", "slurm.sbatch.constraint=a100")
    for line in ("nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "partition=main", "time=100", "mem-per-gpu=80G"):
        assert f"#SBATCH --{line}\n" in said
    assert "#SBATCH --exclude=n7\n" in said
    assert "#SBATCH --constraint=a100\n" in said
    assert "3 node(s) × 4 task(s), 12 GPU(s)" in said
    assert not (tmp_path / "run").exists()


def test_probe_takes_the_partition_over_and_waits_for_a_good_end(dry_run, tmp_path):
    script = dry_run("--then", "configs/evals/demo.yaml").rpartition("#!/bin/bash")[2]
    for line in ("partition=main", "nodes=1", "kill-on-invalid-dep=yes", "dependency='afterok:<its id>'"):
        assert f"#SBATCH --{line}\n" in script
    assert f"folder: {tmp_path / 'run'}\n" in dry_run("--then", "configs/evals/demo.yaml").split("pretrain:")[1]


def test_sweep_makes_a_grid_of_runs(dry_run, tmp_path):
    said = dry_run("--sweep", "optimization.lr=1e-3,2e-3", "--sweep", "optimization.betas=[0.9,0.95],[0.9,0.99]")
    assert said.count(f"folder: {tmp_path}/run/optimization.lr-") == 4
    assert f"folder: {tmp_path}/run/optimization.lr-2e-3_optimization.betas-_0.9_0.99_\n" in said
    assert said.count("lr: 0.002\n") == said.count("lr: 0.001\n") == 2
    assert "#SBATCH --array=0-3%4\n" in said


def test_array_asks_for_the_most_and_tells_srun_what_each_has(fname, tmp_path, capsys):
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump({"base": fname, "slurm": {"nodes": 1, "tasks_per_node": 8, "time": 20}}))
    listed = tmp_path / "list.yaml"
    listed.write_text(yaml.safe_dump([fname, str(small)]))
    assert "--folder is missing" in refused(["--batch-launch", str(listed)], capsys)
    run(PROGRAMS, ["--batch-launch", "--fname", str(listed), "--folder", str(tmp_path / "all"), "--dry-run"])
    said = capsys.readouterr().out
    for line in ("nodes=2", "ntasks-per-node=8", "time=100", "hold", "array=0-1%2"):
        assert f"#SBATCH --{line}\n" in said
    exports = [line for line in said.splitlines() if "export SLURM_NTASKS" in line]
    assert ["SLURM_NTASKS=8" in exports[0], "SLURM_NTASKS_PER_NODE=4" in exports[0]] == [True, True]
    assert ["SLURM_NTASKS=8" in exports[1], "SLURM_NTASKS_PER_NODE=8" in exports[1]] == [True, True]
    assert f"folder: {tmp_path}/all/small\n" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "slurm.nodes"),
        (["slurm.nods=2"], "Did you mean 'nodes'?"),
        (["--time", "5"], "slurm: time: 5 minutes are over before the warning"),
        (["--time", "6", "slurm.warn_seconds=310"], "between two checkpoints"),
        (["slurm.device=cpu"], "mem_per_gpu: device is cpu"),
        (["--sweep", "optimization.lr"], "written key.path=a,b,c"),
        (["--sweep", "optimization.lr=0.1,0.1"], "several runs would write to"),
        (["--sweep", "slurm.device=cpu,cuda", "slurm.mem_per_gpu=null"], "slurm.device cannot differ"),
        (["--batch-launch", "configs/pretrain/debug.yaml", "--folder", "x"], "a list of configuration files"),
        (["--nodess", "3"], "unknown: --nodess"),
    ],
)
def test_mistakes_are_named(fname, words, message, capsys):
    assert message in refused(["--fname", fname, "--dry-run", *words], capsys)


def test_no_slurm_here(fname, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch on the PATH" in refused(["--fname", fname], capsys)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"partition": "mian"}, "Did you mean 'main'?"),
        ({"tasks_per_node": 16}, "slurm.tasks_per_node: 16 tasks need as many GPUs, a node of this cluster has 8"),
        ({"tasks_per_node": 8, "cpus_per_task": 4}, "slurm.cpus_per_task"),
        ({"nodes": 5}, "would wait for ever"),
        ({"time": 61}, "slurm.time: 61 minutes, but this cluster allows 60"),
    ],
)
def test_what_no_node_can_give_is_refused(asked, message, tmp_path):
    cluster.check(SlurmConfig(time=60), tmp_path, KNOWN)
    with pytest.raises(ConfigError, match=r".") as error:
        cluster.check(SlurmConfig(**({"time": 60} | asked)), tmp_path, KNOWN)
    assert message in str(error.value)


def test_folder_in_tmp_of_a_login_node_is_refused():
    elsewhere = [Node("main", "gpu17", "gpu17", cpus=16, gpus=8, minutes=None)]
    with pytest.raises(ConfigError, match="/tmp.*the nodes would not see it"):
        cluster.check(SlurmConfig(), Path("/tmp/run"), elsewhere)


def test_node_without_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (("RANK", 3), ("WORLD_SIZE", 8), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=rf"no GPU on {socket.gethostname()}; .*slurm\.device=cpu"):
        distributed.init_from_environment(on_cpu=False)


def test_nodes_are_read_as_sinfo_writes_them(tmp_path, monkeypatch):
    lines = [
        "main|n0|10.0.0.1|128|gpu:a100:8(S:0-1)|2-00:30:00",
        "cpu|n1|n1|64+|(null)|infinite",
        "x|n2|n2|4|gpu:2|30:00",
    ]
    pretend(tmp_path, monkeypatch, sbatch="", sinfo=f"cat <<'end'\n{chr(10).join(lines)}\nend")
    first, second, third = cluster.nodes()
    assert first == Node("main", "n0", "10.0.0.1", 128, 8, 2 * 1440 + 30)
    assert (second.cpus, second.gpus, second.minutes) == (64, 0, None)
    assert (third.gpus, third.minutes) == (2, 30)


@pytest.mark.parametrize(
    ("number", "state", "reason", "preempted", "again"),
    [
        (12, "RUNNING", "None", "None", True),  # the warning
        (15, "RUNNING", "None", "None", False),  # somebody's scancel --signal=TERM
        (15, "RUNNING", "None", "2026-11-21T06:20:41", True),
        (15, "COMPLETING", "TimeLimit", "None", True),
        (12, "COMPLETING", "TimeLimit", "None", True),  # the warning and the limit at once
        (15, "COMPLETING", "None", "None", False),  # scancel
        (12, "COMPLETING", "None", "None", False),  # scancel after the warning
    ],
)
def test_which_stopped_job_starts_again(number, state, reason, preempted, again):
    job = {"JobState": state, "Reason": reason, "PreemptTime": preempted}
    assert requeue.goes_on(number, job) is again


def test_a_controller_that_does_not_answer_stops_no_job_that_was_warned(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, scontrol="exit 1")
    monkeypatch.setattr(requeue, "SECONDS_BETWEEN", 0.0)
    known = requeue._known("12")
    assert known == {}
    assert requeue.goes_on(signal.SIGUSR2, known)
    assert not requeue.goes_on(signal.SIGTERM, known)


def test_an_empty_section_asks_for_the_usual(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {Path('configs/pretrain/debug.yaml').absolute()}\nslurm:\n")
    run(PROGRAMS, ["--fname", str(path), "--dry-run", "--folder", str(tmp_path / "run")])
    assert "#SBATCH --nodes=1" in capsys.readouterr().out


def test_only_the_first_process_is_heard(tmp_path, monkeypatch):
    attempt = Attempt(tmp_path, "7", 0)
    for rank in (2, 0):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        attempt.note_end(error=f"of rank {rank}")
    assert json.loads(attempt.ended.read_text())["error"] == "of rank 2"
    assert os.listdir(tmp_path) == [attempt.ended.name]


def test_snapshot_has_what_git_knows_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for name in ("kept.py", "removed.py"):
        Path(name).write_text("committed\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    Path("kept.py").write_text("edited\n")
    Path("removed.py").unlink()
    Path("new.py").write_text("unknown to git\n")
    with pytest.warns(UserWarning, match=r"git does not know them: new\.py$"):
        code = snapshot.take(tmp_path / "run")
    assert {path.name for path in code.iterdir()} == {"kept.py", "git.txt"}
    assert (code / "kept.py").read_text() == "edited\n"
    assert "+edited" in (tmp_path / "run" / "git.txt").read_text()
    assert f"pytest=={pytest.__version__}" in (tmp_path / "run" / "pip_freeze.txt").read_text()


def test_without_git_jobs_run_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="no copy of the code"):
        assert snapshot.take(tmp_path / "run") == tmp_path


def test_folder_without_jobs(tmp_path):
    with pytest.raises(ConfigError, match=r"no jobs\.json"):
        status.table(tmp_path)


VERDICT = "rank 1 on n3 failed (ValueError: a clip); the last it noted: in step 3, at x.py:1 in f"


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Folder of three jobs: one runs, one has failed, the number of one was given anew to a job of another folder."""
    root, output = tmp_path / "run", tmp_path / "run" / "slurm"
    output.mkdir(parents=True)
    runs = {"12": ("runs", "RUNNING", output), "13": ("fails", "FAILED", output), "14": ("old", "RUNNING", tmp_path)}
    cases = ""
    for job, (name, state, place) in runs.items():
        said = f"JobId={job} JobState={state} NodeList=n[2-3] Reason=None StdOut={place}/{job}_0_log.out"
        cases += f"*{job}) echo '{said}' ;;\n"
        (root / name).mkdir()
    scancel = f"echo $@ > {tmp_path}/cancelled"
    pretend(tmp_path, monkeypatch, sbatch="", scontrol=f'case "$*" in\n{cases}esac', scancel=scancel)
    jobs = [Submitted(job, name, str(root / name), None, 0.0, {}) for job, (name, _, _) in runs.items()]
    (root / "jobs.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    line = {"step": 400, "last_step": 1000, "loss": 0.51239, "clips_per_second": 64.04, "step_seconds": 9.0}
    lines = [json.dumps({**line, "step": 399}), json.dumps(line), '{"step": 4']
    (root / "runs" / "log.jsonl").write_text("\n".join(lines))
    start = json.dumps({"time": 0.0, "nodes": "n[2-3]"})
    for name in ("12_started-0", "12_started-1", "12_started-2", "13_started-0"):
        (output / f"{name}.json").write_text(start)
    error = "Traceback (most recent call last):\n  File x.py\nValueError: a clip\n"
    (output / "13_ended-0.json").write_text(json.dumps({"rank": 1, "host": "n3", "time": 0.0, "error": error}))
    lines = ["fails: 3/9", f"error: the job ends, as {VERDICT}", "srun: error: n3: task 1: Exited with exit code 1", ""]
    (output / "13_0_log.err").write_text("\n".join(lines))
    return root


def test_status_of_jobs(watched):
    header, runs, fails, _old, *below = status.table(watched).splitlines()
    assert header.split()[:5] == ["job", "name", "state", "nodes", "restarts"]
    assert runs.split() == ["12", "runs", "RUNNING", "n[2-3]", "2", "400/1000", "0.5124", "64.0", "1:30", "h", "-"]
    assert fails.split()[:5] == ["13", "fails", "FAILED", "n[2-3]", "0"]
    assert fails.endswith(VERDICT)
    assert below[1] == "13 fails:"
    assert "  rank 1 on n3 failed first:" in below
    assert below[-1] == "  ValueError: a clip"


def test_cancel_leaves_other_folders_jobs(watched, tmp_path):
    assert status.cancel(watched) == "cancelled: 12"
    assert (tmp_path / "cancelled").read_text() == "12\n"


def test_status_without_slurm(watched, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="no sbatch on the PATH"):
        status.table(watched)


def test_evals_take_no_then():
    words = [sys.executable, "-m", "evals.main_distributed", "--fname", "x", "--then", "y"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown: --then" in done.stderr
