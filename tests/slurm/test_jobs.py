"""Runs on a real SLURM: after any interruption they end with the same parameters as without SLURM."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
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


def test_signal_before_the_time_limit(site, uninterrupted):
    job = site.submit_and_wait()
    since = time.time()
    site.cluster.command(f"scancel --signal=USR2 {job}")
    assert site.assert_resumes(job, "USR2", since, uninterrupted) == 0


def test_preemption(site, uninterrupted):
    job = site.submit_and_wait()
    since = time.time()
    site.cluster.command("sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap=true")
    assert site.assert_resumes(job, "preemption", since, uninterrupted) == 0


def test_time_limit(site, uninterrupted):
    job = site.submit_and_wait()
    since = time.time()
    site.cluster.command(
        f"scontrol update JobId={job} EndTime=now+1"
    )  # SLURM checks limits every 30 s: too late for the first signal
    assert site.assert_resumes(job, "time limit", since, uninterrupted) == 0


def test_node_down(site, uninterrupted):
    job = site.submit_and_wait()
    since = time.time()
    site.cluster.command("scontrol update NodeName=n1 State=DOWN Reason=test")  # it returns to service as it responds
    site.assert_resumes(job, "node down", since, uninterrupted)


def test_max_requeues(site):
    job = site.submit_and_wait("slurm.max_requeues=0")
    site.cluster.command(f"scancel --signal=USR2 {job}")
    site.wait_for_state(job, "FAILED")
    assert "slurm.max_requeues=0" in site.logs()


def test_cancel_ends_only_jobs_of_its_folder_and_the_same_command_resumes(site, uninterrupted):
    job = site.submit_and_wait()
    other = site.cluster.command("sbatch --parsable --output=/dev/null --wrap='sleep 600'")
    assert site.launch("--cancel", str(site.folder)) == f"cancelled: {job}\n"
    site.wait_for_state(job, "CANCELLED")
    assert site.cluster.command(f"squeue -h -o %T -j {other}") in ("PENDING", "RUNNING")
    site.cluster.command(f"scancel {other}")
    assert site.assert_same_command_resumes("scancel", uninterrupted) == 0


def test_exception(site, uninterrupted):
    job = site.submit_and_wait(step=8)
    site.switch("broken", True)
    site.wait_for_state(job, "FAILED")
    shown = site.launch("--status", str(site.folder))
    assert "rank 1 on n1 failed first" in shown
    assert "ValueError: this clip is broken" in shown
    assert not list((site.folder / "slurm").glob(f"{job}_started-1.json"))
    site.switch("broken", False)
    site.assert_same_command_resumes("exception", uninterrupted)


def test_killed_task(site, uninterrupted):
    job = site.submit_and_wait(step=8)
    os.kill(pid_of(job, rank=1), signal.SIGKILL)
    site.wait_for_state(job, "FAILED")
    assert "task 1: Killed" in site.launch("--status", str(site.folder))
    site.assert_same_command_resumes("SIGKILL", uninterrupted)


def test_full_disk(site, small_disk, uninterrupted):
    site.folder = small_disk / "run"
    job = site.submit_and_wait(step=8)
    filler = small_disk / "filler"
    with open(filler, "wb") as file:  # leaves space for the log, not for a checkpoint
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 40_000)
    site.wait_for_state(job, "FAILED")
    before = newest_step(site.folder)
    assert before > 0
    filler.unlink()
    shown = site.launch("--status", str(site.folder))
    assert "No space left on device" in shown
    site.assert_same_command_resumes("full disk", uninterrupted)


def test_array_with_different_resources_of_which_one_fails(site, uninterrupted, tmp_path):
    configurations = {
        "wide": {"slurm": {"nodes": 2, "tasks_per_node": 1, "time": 60}},
        "deep": {"slurm": {"nodes": 1, "tasks_per_node": 2, "time": 30, "cpus_per_task": 2}},
        "lost": {"slurm": {"nodes": 1, "time": 20}, "data": {"datasets": ["nowhere.csv"]}},
    }
    for name, raw in configurations.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"base": site.fname, **raw}))
    files = [str(tmp_path / f"{name}.yaml") for name in configurations]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(files))
    output = site.launch("--batch-launch", str(tmp_path / "list.yaml"), "--folder", str(site.folder))
    wide, deep, lost = (line.split()[0] for line in output.splitlines()[:3])
    array = wide.split("_")[0]
    assert (wide, deep, lost) == (f"{array}_0", f"{array}_1", f"{array}_2")
    site.wait_for_state(lost, "FAILED")
    site.wait_for_state(deep, "COMPLETED")
    site.wait_for_state(wide, "COMPLETED")
    allocated = [
        site.cluster.command(f"sacct -X -n -P -o NNodes,AllocCPUS,TimelimitRaw -j {job}") for job in (wide, deep, lost)
    ]
    assert allocated == ["2|2|60", "1|4|30", "1|1|20"]
    assert same_parameters(site.folder / "wide", uninterrupted)
    assert same_parameters(site.folder / "deep", uninterrupted)
    assert "nowhere.csv" in site.launch("--status", str(site.folder))


@pytest.mark.parametrize("program", ["index", "pack"])
def test_tasks_of_an_array_write_what_one_process_writes(site, tmp_path, program):
    fname, shared = f"configs/data/{program}.yaml", tmp_path / "array"
    common = [f"data.datasets=[{site.clips / 'motion_train.csv'}]", "processes=1", "slurm.cpus_per_task=1"]
    if program == "index":
        common.append("part_size=4")
        arguments = [f"index={shared}/index.parquet"]
    else:
        common.append("videos_per_shard=4")
        arguments = [f"output={shared}", "tasks=2"]
    output = site.launch(
        "--fname", fname, "--folder", str(site.folder), *common, *arguments, "--sweep", "task=0,1"
    )  # fmt: skip
    for line in output.splitlines()[:2]:
        site.wait_for_state(line.split()[0], "COMPLETED")
    local = tmp_path / "local"
    run(site.checkout, "app.main", "--fname", fname, "--devices", "cpu", f"folder={local}", *common)
    if program == "index":
        expected = pq.read_table(local / "index.parquet")
        assert expected.num_rows == 16
        assert pq.read_table(shared / "index.parquet").equals(expected)
    else:
        names = [f"shard-{number:06d}.tar" for number in range(4)]
        assert sorted(path.name for path in shared.glob("*.tar")) == names
        for name in names:
            assert (shared / name).read_bytes() == (local / name).read_bytes()


def test_job_runs_the_code_at_submission(site, uninterrupted):
    job = site.submit("slurm.sbatch.hold=true")
    edited = site.checkout / "app" / "vjepa" / "train.py"
    before = edited.read_text()
    edited.write_text("raise RuntimeError('edited after the submission')\n")
    site.cluster.command(f"scontrol release {job}")
    site.wait_for_state(job, "COMPLETED", "FAILED")
    edited.write_text(before)
    assert same_parameters(site.folder, uninterrupted)


def pid_of(job: str, rank: int) -> int:
    """The process id of a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended, or belongs to another user
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        if wanted <= set(environment) and b"submitit" in command:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} of job {job}")
