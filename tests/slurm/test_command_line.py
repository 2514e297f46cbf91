"""Submission without a cluster: the scripts, invalid requests, status."""

import dataclasses
import json
import os
import shutil
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
from tubelet.slurm.attempt import Attempt
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
    slurm = {"nodes": 2, "tasks_per_node": 4, "partition": "main", "time": 100, "mem_per_gpu": "40G"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "folder": str(tmp_path / "run"), "slurm": slurm}))
    return str(path)


@pytest.fixture
def dry_run(fname, capsys):
    """`dry_run(*arguments)`: the output of a dry run of the file."""

    def call(*arguments):
        run(PROGRAMS, ["--fname", fname, "--dry-run", *arguments], then="evals.main")
        return capsys.readouterr().out

    return call


def error_of(arguments, capsys):
    """The error message of the command line."""
    with pytest.raises(SystemExit) as stop:
        run(PROGRAMS, arguments, then="evals.main")
    return str(stop.value) + capsys.readouterr().err


def fake_commands(folder, monkeypatch, **commands):
    """Replace SLURM's commands by shell scripts."""
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_command_line_overrides_the_file(dry_run, tmp_path):
    output = dry_run("--nodes", "3", "--mem-per-gpu", "80G", "--exclude", "n7", "slurm.sbatch.constraint=a100")
    assert "wckey" not in output
    for line in ("nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "partition=main", "time=100", "mem-per-gpu=80G"):
        assert f"#SBATCH --{line}\n" in output
    assert "#SBATCH --exclude=n7\n" in output
    assert "#SBATCH --constraint=a100\n" in output
    assert "3 node(s) × 4 task(s), 12 GPU(s)" in output
    assert not (tmp_path / "run").exists()


def test_probe_inherits_the_partition_and_depends_on_the_run(dry_run, tmp_path):
    script = dry_run("--then", "configs/evals/demo.yaml").rpartition("#!/bin/bash")[2]
    for line in ("partition=main", "nodes=1", "kill-on-invalid-dep=yes", "dependency='afterok:<its id>'"):
        assert f"#SBATCH --{line}\n" in script
    assert f"folder: {tmp_path / 'run'}\n" in dry_run("--then", "configs/evals/demo.yaml").split("pretrain:")[1]


def test_sweeps_make_a_grid_of_runs(dry_run, tmp_path):
    output = dry_run("--sweep", "optimization.lr=1e-3,2e-3", "--sweep", "optimization.betas=[0.9,0.95],[0.9,0.99]")
    assert output.count(f"folder: {tmp_path}/run/optimization.lr-") == 4
    assert f"folder: {tmp_path}/run/optimization.lr-2e-3_optimization.betas-_0.9_0.99_\n" in output
    assert output.count("lr: 0.002\n") == output.count("lr: 0.001\n") == 2
    assert "#SBATCH --array=0-3%4\n" in output


def test_array_requests_the_largest_resources_and_srun_gets_those_of_its_task(fname, tmp_path, capsys):
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump({"base": fname, "slurm": {"nodes": 1, "tasks_per_node": 8, "time": 20}}))
    listed = tmp_path / "list.yaml"
    listed.write_text(yaml.safe_dump([fname, str(small)]))
    assert "--folder is missing" in error_of(["--batch-launch", str(listed)], capsys)
    run(PROGRAMS, ["--batch-launch", "--fname", str(listed), "--folder", str(tmp_path / "all"), "--dry-run"])
    output = capsys.readouterr().out
    for line in ("nodes=2", "ntasks-per-node=8", "time=100", "hold", "array=0-1%2"):
        assert f"#SBATCH --{line}\n" in output
    exports = [line for line in output.splitlines() if "export SLURM_NTASKS" in line]
    assert ["SLURM_NTASKS=8" in exports[0], "SLURM_NTASKS_PER_NODE=4" in exports[0]] == [True, True]
    assert ["SLURM_NTASKS=8" in exports[1], "SLURM_NTASKS_PER_NODE=8" in exports[1]] == [True, True]
    assert f"folder: {tmp_path}/all/small\n" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "slurm.nodes"),
        (["slurm.nods=2"], "Did you mean 'nodes'?"),
        (["--time", "5"], "slurm: time: 5 minutes are shorter than warn_seconds: 300"),
        (["--time", "6", "slurm.warn_seconds=310"], "between two checkpoints"),
        (["slurm.device=cpu"], "mem_per_gpu: device is cpu"),
        (["--sweep", "optimization.lr"], "expected key.path=a,b,c"),
        (["--sweep", "optimization.lr=0.1,0.1"], "several runs would write to"),
        (["--sweep", "slurm.device=cpu,cuda", "slurm.mem_per_gpu=null"], "slurm.device cannot differ"),
        (["--batch-launch", "configs/pretrain/debug.yaml", "--folder", "x"], "a list of configuration files"),
        (["--nodess", "3"], "unrecognized arguments: --nodess 3"),
    ],
)
def test_invalid_arguments_are_named(fname, arguments, message, capsys):
    assert message in error_of(["--fname", fname, "--dry-run", *arguments], capsys)


def test_missing_slurm_is_an_error(fname, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch on the PATH" in error_of(["--fname", fname], capsys)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"partition": "mian"}, "Did you mean 'main'?"),
        ({"tasks_per_node": 16}, "slurm.tasks_per_node: 16 tasks need as many GPUs, a node of this cluster has 8"),
        ({"tasks_per_node": 8, "cpus_per_task": 4}, "slurm.cpus_per_task"),
        ({"nodes": 5}, "would never start"),
        ({"time": 61}, "slurm.time: 61 minutes, but this cluster allows 60"),
    ],
)
def test_requests_that_no_node_can_satisfy_are_refused(requested, message, tmp_path):
    cluster.check(SlurmConfig(time=60), tmp_path, KNOWN)
    with pytest.raises(ConfigError, match=r".") as error:
        cluster.check(SlurmConfig(**({"time": 60} | requested)), tmp_path, KNOWN)
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


def test_output_of_sinfo_is_parsed(tmp_path, monkeypatch):
    lines = [
        "main|n0|10.0.0.1|128|gpu:a100:8(S:0-1)|2-00:30:00",
        "cpu|n1|n1|64+|(null)|infinite",
        "x|n2|n2|4|gpu:2|30:00",
    ]
    fake_commands(tmp_path, monkeypatch, sbatch="", sinfo=f"cat <<'end'\n{chr(10).join(lines)}\nend")
    first, second, third = cluster.nodes()
    assert first == Node("main", "n0", "10.0.0.1", 128, 8, 2 * 1440 + 30)
    assert (second.cpus, second.gpus, second.minutes) == (64, 0, None)
    assert (third.gpus, third.minutes) == (2, 30)


@pytest.mark.parametrize(
    ("number", "state", "reason", "preempted", "resumes"),
    [
        (12, "RUNNING", "None", "None", True),  # the signal before the limit
        (15, "RUNNING", "None", "None", False),  # scancel --signal=TERM
        (15, "RUNNING", "None", "2026-11-21T06:20:41", True),
        (15, "COMPLETING", "TimeLimit", "None", True),
        (12, "COMPLETING", "TimeLimit", "None", True),  # both signals of the limit at once
        (15, "COMPLETING", "None", "None", False),  # scancel
        (12, "COMPLETING", "None", "None", False),  # scancel after the signal before the limit
    ],
)
def test_which_stopped_jobs_are_requeued(number, state, reason, preempted, resumes):
    job = {"JobState": state, "Reason": reason, "PreemptTime": preempted}
    assert requeue.should_resume(number, job) is resumes


def test_job_stopped_before_the_limit_is_requeued_if_the_controller_does_not_respond(tmp_path, monkeypatch):
    fake_commands(tmp_path, monkeypatch, scontrol="exit 1")
    monkeypatch.setattr(requeue, "SECONDS_BETWEEN", 0.0)
    job = requeue._show("12")
    assert job == {}
    assert requeue.should_resume(signal.SIGUSR2, job)
    assert not requeue.should_resume(signal.SIGTERM, job)


def test_an_empty_section_means_the_defaults(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {Path('configs/pretrain/debug.yaml').absolute()}\nslurm:\n")
    run(PROGRAMS, ["--fname", str(path), "--dry-run", "--folder", str(tmp_path / "run")])
    assert "#SBATCH --nodes=1" in capsys.readouterr().out


def test_only_the_first_end_is_recorded(tmp_path, monkeypatch):
    attempt = Attempt(tmp_path, "7", 0)
    for rank in (2, 0):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        attempt.record_end(error=f"of rank {rank}")
    assert json.loads(attempt.end_file.read_text())["error"] == "of rank 2"
    assert os.listdir(tmp_path) == [attempt.end_file.name]


def test_a_signal_after_the_program_does_not_make_the_job_fail(tmp_path):
    script = f"""
import os, signal
from tubelet.slurm import job
class Program:
    def run(self, world):
        pass
job.load = lambda *arguments: Program()
job.distributed.init_from_environment = lambda on_cpu: None
job.Job(None, "", {str(tmp_path)!r}, "/", True, 0)()
for number in (signal.SIGUSR2, signal.SIGTERM):
    os.kill(os.getpid(), number)
"""
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n0"}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment})
    assert done.returncode == 0
    assert os.listdir(tmp_path) == ["7_started-0.json"]


def test_snapshot_has_tracked_files_with_uncommitted_changes(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for name in ("kept.py", "removed.py"):
        Path(name).write_text("committed\n")
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    Path("kept.py").write_text("edited\n")
    Path("removed.py").unlink()
    Path("new.py").write_text("untracked\n")
    code = snapshot.take(tmp_path / "run")
    assert "git does not track them: new.py" in caplog.messages[0]
    assert {path.name for path in code.iterdir()} == {"kept.py", "git.txt"}
    assert (code / "kept.py").read_text() == "edited\n"
    assert "+edited" in (tmp_path / "run" / "git.txt").read_text()
    assert f"pytest=={pytest.__version__}" in (tmp_path / "run" / "pip_freeze.txt").read_text()


def test_without_git_jobs_run_in_the_current_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert snapshot.take(tmp_path / "run") == tmp_path
    assert "the code is not copied" in caplog.text


def test_status_of_a_folder_without_jobs(tmp_path):
    with pytest.raises(ConfigError, match=r"no jobs\.json"):
        status.table(tmp_path)


FAILURE = "rank 1 on n3 failed (ValueError: a clip); last activity: in step 3, at x.py:1 in f"


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Folder of three jobs: one runs, one has failed, the id of one was reused for a job of another folder."""
    root, output = tmp_path / "run", tmp_path / "run" / "slurm"
    output.mkdir(parents=True)
    runs = {"12": ("runs", "RUNNING", output), "13": ("fails", "FAILED", output), "14": ("old", "RUNNING", tmp_path)}
    cases = ""
    for job, (name, state, logs) in runs.items():
        shown = f"JobId={job} JobState={state} NodeList=n[2-3] Reason=None StdOut={logs}/{job}_0_log.out"
        cases += f"*{job}) echo '{shown}' ;;\n"
        (root / name).mkdir()
    scancel = f"echo $@ > {tmp_path}/cancelled"
    fake_commands(tmp_path, monkeypatch, sbatch="", scontrol=f'case "$*" in\n{cases}esac', scancel=scancel)
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
    lines = ["fails: 3/9", f"error: job aborted: {FAILURE}", "srun: error: n3: task 1: Exited with exit code 1", ""]
    (output / "13_0_log.err").write_text("\n".join(lines))
    return root


def test_status_of_jobs(watched):
    header, runs, fails, _old, *below = status.table(watched).splitlines()
    assert header.split()[:5] == ["job", "name", "state", "nodes", "restarts"]
    assert runs.split() == ["12", "runs", "RUNNING", "n[2-3]", "2", "400/1000", "0.5124", "64.0", "1:30", "h", "-"]
    assert fails.split()[:5] == ["13", "fails", "FAILED", "n[2-3]", "0"]
    assert fails.endswith(FAILURE)
    assert below[1] == "13 fails:"
    assert "  rank 1 on n3 failed first:" in below
    assert below[-1] == "  ValueError: a clip"


def test_progress_is_shown_with_the_newest_job_of_a_run(watched):
    jobs = json.loads((watched / "jobs.json").read_text())
    first = {**jobs[0], "job": "11"}  # stopped, and submitted again as job 12
    (watched / "jobs.json").write_text(json.dumps([first, *jobs]))
    _, stopped, runs, *_ = status.table(watched).splitlines()
    assert "/1000" not in stopped
    assert "400/1000" in runs


def test_a_cluster_without_accounting(watched, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None if name == "sacct" else which(name))
    assert cluster.state("12") == ("RUNNING", "n[2-3]")
    assert cluster.state("11") == ("UNKNOWN", "")  # the controller has forgotten it


def test_cancel_does_not_cancel_jobs_of_other_folders(watched, tmp_path):
    assert status.cancel(watched) == "cancelled: 12"
    assert (tmp_path / "cancelled").read_text() == "12\n"


def test_status_without_slurm(watched, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="no sbatch on the PATH"):
        status.table(watched)


def test_evals_have_no_then():
    command = [sys.executable, "-m", "evals.main_distributed", "--fname", "x.yaml", "--then", "y.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unrecognized arguments: --then y.yaml" in done.stderr


@pytest.mark.parametrize("module", ["app.main", "app.main_distributed", "evals.main", "evals.main_distributed"])
def test_help_does_not_import_torch(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "key.path=value" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "matplotlib", "numpy", "submitit"}
