"""Runs on a real SLURM: they end as without it, whatever happens on the way."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.slurm.conftest import STEPS, newest_step, run, same_parameters

pytestmark = pytest.mark.slurm


def test_two_nodes_two_tasks_and_then_a_probe(site, probe_fname, tmp_path):
    job = site.submit("--tasks-per-node", "2", "--then", probe_fname, "data.batch_size=1")
    local = ["--devices", "cpu", "--processes", "4", "data.batch_size=1", f"folder={tmp_path / 'local'}"]
    run(site.checkout, "app.main", "--fname", site.fname, *local)
    site.wait_for_state(job, "COMPLETED")
    assert same_parameters(site.folder, tmp_path / "local")
    probe = json.loads((site.folder / "jobs.json").read_text())[1]
    assert probe["after"] == job
    site.wait_for_state(probe["job"], "COMPLETED")
    assert "top1" in (site.folder / "probe" / "results.json").read_text()
    shown = site.launch("--status", str(site.folder))
    assert shown.count("COMPLETED") == 2
    assert f"{STEPS}/{STEPS}" in shown


def test_warning_signal(site, uninterrupted):
    job = site.interrupted()
    since = time.time()
    site.cluster.ask(f"scancel --signal=USR2 {job}")
    assert site.goes_on(job, "USR2", since, uninterrupted) == 0


def test_preemption(site, uninterrupted):
    job = site.interrupted()
    since = time.time()
    site.cluster.ask("sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap=true")
    assert site.goes_on(job, "preemption", since, uninterrupted) == 0


def test_time_limit(site, uninterrupted):
    job = site.interrupted()
    since = time.time()
    site.cluster.ask(f"scontrol update JobId={job} EndTime=now+1")  # SLURM looks every 30 s: no time for the warning
    assert site.goes_on(job, "time limit", since, uninterrupted) == 0


def test_node_down(site, uninterrupted):
    job = site.interrupted()
    since = time.time()
    site.cluster.ask("scontrol update NodeName=n1 State=DOWN Reason=test")  # it comes back as it answers
    site.goes_on(job, "node down", since, uninterrupted)


def test_no_more_requeues_than_allowed(site):
    job = site.interrupted("slurm.max_requeues=0")
    site.cluster.ask(f"scancel --signal=USR2 {job}")
    site.wait_for_state(job, "FAILED")
    assert "slurm.max_requeues=0" in site.told()


def test_cancel_takes_its_own_jobs_only_and_the_same_command_continues(site, uninterrupted):
    job = site.interrupted()
    other = site.cluster.ask("sbatch --parsable --output=/dev/null --wrap='sleep 600'")
    assert site.launch("--cancel", str(site.folder)) == f"cancelled: {job}\n"
    site.wait_for_state(job, "CANCELLED")
    assert site.cluster.ask(f"squeue -h -o %T -j {other}") in ("PENDING", "RUNNING")
    site.cluster.ask(f"scancel {other}")
    assert site.continues_with_the_same_command("scancel", uninterrupted) == 0


def test_code_that_raises(site, uninterrupted):
    job = site.interrupted(at=8)
    site.mood("broken", True)
    site.wait_for_state(job, "FAILED")
    shown = site.launch("--status", str(site.folder))
    assert "rank 1 on n1 failed first" in shown
    assert "ValueError: this clip is broken" in shown
    assert not list((site.folder / "slurm").glob(f"{job}_started-1.json"))
    site.mood("broken", False)
    site.continues_with_the_same_command("raised", uninterrupted)


def test_killed_task(site, uninterrupted):
    job = site.interrupted(at=8)
    os.kill(pid_of(job, rank=1), signal.SIGKILL)
    site.wait_for_state(job, "FAILED")
    assert "task 1: Killed" in site.launch("--status", str(site.folder))
    site.continues_with_the_same_command("SIGKILL", uninterrupted)


def test_full_disk(site, small_disk, uninterrupted):
    site.folder = small_disk / "run"
    job = site.interrupted(at=8)
    filler = small_disk / "filler"
    with open(filler, "wb") as file:  # leaves room for lines of the log, not for a checkpoint
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 40_000)
    site.wait_for_state(job, "FAILED")
    before = newest_step(site.folder)
    assert before > 0
    filler.unlink()
    shown = site.launch("--status", str(site.folder))
    assert "No space left on device" in shown
    site.continues_with_the_same_command("full disk", uninterrupted)


def test_array_of_three_with_their_own_resources_of_which_one_fails(site, uninterrupted, tmp_path):
    asked = {
        "wide": {"slurm": {"nodes": 2, "tasks_per_node": 1, "time": 60}},
        "deep": {"slurm": {"nodes": 1, "tasks_per_node": 2, "time": 30, "cpus_per_task": 2}},
        "lost": {"slurm": {"nodes": 1, "time": 20}, "data": {"datasets": ["nowhere.csv"]}},
    }
    for name, raw in asked.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"base": site.fname, **raw}))
    files = [str(tmp_path / f"{name}.yaml") for name in asked]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(files))
    said = site.launch("--batch-launch", str(tmp_path / "list.yaml"), "--folder", str(site.folder))
    wide, deep, lost = (line.split()[0] for line in said.splitlines()[:3])
    array = wide.split("_")[0]
    assert (wide, deep, lost) == (f"{array}_0", f"{array}_1", f"{array}_2")
    site.wait_for_state(lost, "FAILED")
    site.wait_for_state(deep, "COMPLETED")
    site.wait_for_state(wide, "COMPLETED")
    had = [site.cluster.ask(f"sacct -X -n -P -o NNodes,AllocCPUS,TimelimitRaw -j {job}") for job in (wide, deep, lost)]
    assert had == ["2|2|60", "1|4|30", "1|1|20"]
    assert same_parameters(site.folder / "wide", uninterrupted)
    assert same_parameters(site.folder / "deep", uninterrupted)
    assert "nowhere.csv" in site.launch("--status", str(site.folder))


def test_job_runs_the_code_that_it_was_submitted_with(site, uninterrupted):
    job = site.submit("slurm.sbatch.hold=true")
    edited = site.checkout / "app" / "vjepa" / "train.py"
    before = edited.read_text()
    edited.write_text("raise RuntimeError('edited after the submission')\n")
    site.cluster.ask(f"scontrol release {job}")
    site.wait_for_state(job, "COMPLETED", "FAILED")
    edited.write_text(before)
    assert same_parameters(site.folder, uninterrupted)


def pid_of(job: str, rank: int) -> int:
    """The Python process of a task."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended, or is another user's
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        if wanted <= set(environment) and b"submitit" in command:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} of job {job}")
