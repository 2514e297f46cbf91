"""Submits runs as jobs: the sbatch script, the resources of each task of an array, `jobs.json`."""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import submitit

from tubelet.config import ConfigError, dump
from tubelet.runtime.files import read_json, write_atomic, write_json
from tubelet.runtime.launch import Package, Program
from tubelet.slurm.job import Job
from tubelet.slurm.options import SlurmConfig

# Resources that `scontrol update` can change in one task of an array. All others are the same in all tasks.
PER_TASK = {"partition", "account", "qos", "time", "nodes", "tasks_per_node", "cpus_per_task", "exclude"}


@dataclass(frozen=True)
class Run:
    """A program to run in `folder`, with its resources."""

    name: str
    folder: Path
    package: Package
    program: Program
    slurm: SlurmConfig


@dataclass(frozen=True)
class Submitted:
    """An entry of `jobs.json`.

    Attributes:
        after: The job that has to complete before it starts.
        submitted: Seconds since the epoch.
    """

    job: str
    name: str
    folder: str
    after: str | None
    submitted: float
    slurm: dict[str, Any]


class Executor(submitit.SlurmExecutor):
    """submitit's executor, which can also make the script where SLURM is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, tasks: int) -> str:
        """The sbatch script of an array with `tasks` tasks, or of a single job."""
        self.parameters["map_count"] = tasks if tasks > 1 else None
        return self._make_submission_file_text(self._submitit_command_str, "")


def submit(runs: Sequence[Run], root: Path, code: Path, *, after: str | None = None) -> list[Submitted]:
    """Submit one run as a job, several as a job array. Adds them to `root/jobs.json`; their output is in `root/slurm`.

    Args:
        root: Folder of all runs.
        code: Folder that the jobs run in.
        after: Job that has to complete before they start; if it fails, they are removed from the queue.
    """
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(run.folder / "config.yaml", dump(run.program.options))
    executor = _executor(runs, root, code, after)
    try:
        jobs = executor.submit_array([_job(run, root) for run in runs])
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"sbatch refused the job: {error}") from None
    submitted = [
        Submitted(job.job_id, run.name, str(run.folder.absolute()), after, time.time(), run.slurm.model_dump())
        for job, run in zip(jobs, runs, strict=True)
    ]
    write_json(root / "jobs.json", [asdict(job) for job in [*read_jobs(root), *submitted]])
    if _differ(runs):
        _set_resources(submitted, runs)
    return submitted


def script(runs: Sequence[Run], root: Path, *, after: str | None = None) -> str:
    """The sbatch script that `submit` would send."""
    return _executor(runs, root, root / "code", after).script(len(runs))


def read_jobs(root: Path) -> list[Submitted]:
    """All jobs that were submitted with the folder `root`, oldest first."""
    return [Submitted(**line) for line in read_json(root / "jobs.json") or []]


def logs(root: Path) -> Path:
    """The folder with the scripts, pickles, output and attempts of the jobs."""
    return (root / "slurm").absolute()


def check_array(runs: Sequence[Run]) -> None:
    """Raise ConfigError if runs differ in resources that must be the same for all tasks of an array."""
    first, *others = [run.slurm.model_dump(exclude=PER_TASK) for run in runs]
    for run, other in zip(runs[1:], others, strict=True):
        if keys := [f"slurm.{key}" for key in first if first[key] != other[key]]:
            raise ConfigError(
                f"{run.name}: {', '.join(keys)} cannot differ from {runs[0].name} in one job array; "
                "submit it separately, or use the same value for all"
            )


def _executor(runs: Sequence[Run], root: Path, code: Path, after: str | None) -> Executor:
    executor = Executor(folder=logs(root))
    # SLURM allows to lower the resources of a waiting task, but not to raise them.
    largest = {key: max(getattr(run.slurm, key) for run in runs) for key in ("time", "nodes", "tasks_per_node")}
    cores = [run.slurm.cpus_per_task for run in runs if run.slurm.cpus_per_task is not None]
    requested = runs[0].slurm.model_copy(update={**largest, "cpus_per_task": max(cores, default=None)})
    additional = {"requeue": True, **requested.sbatch}
    if after is not None:
        additional["kill-on-invalid-dep"] = "yes"
    if _differ(runs):
        additional["hold"] = True
    executor.update_parameters(
        job_name=runs[0].name if len(runs) == 1 else root.name,
        partition=requested.partition,
        account=requested.account,
        qos=requested.qos,
        time=requested.time,
        nodes=requested.nodes,
        ntasks_per_node=requested.tasks_per_node,
        cpus_per_task=requested.cpus_per_task,
        gpus_per_node=requested.gpus_per_node or None,
        mem_per_gpu=requested.mem_per_gpu,
        exclude=requested.exclude,
        dependency=f"afterok:{after}" if after else None,
        signal_delay_s=requested.warn_seconds,
        setup=_setup(runs, code.absolute()),
        srun_args=["--kill-on-bad-exit=1"],
        teardown=_teardown(requested, root),
        wckey=None,  # without it, submitit's own name is sent, which accounting may not know
        additional_parameters=additional,
    )
    return executor


def _setup(runs: Sequence[Run], code: Path) -> list[str]:
    folder = shlex.quote(str(code))
    lines = [
        "trap '' TERM  # the script has to outlive its processes, to requeue the job",
        f"cd {folder} || exit 1",
        f"export PYTHONPATH={folder}:{folder}/src${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    if not _differ(runs):
        return [*lines, _srun_environment(runs[0].slurm)]
    cases = [f"  {task}) {_srun_environment(run.slurm)} ;;" for task, run in enumerate(runs)]
    return [*lines, "case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]


def _srun_environment(slurm: SlurmConfig) -> str:
    """Variables for srun: sbatch sets those of the whole array, instead of those of this task."""
    tasks = slurm.nodes * slurm.tasks_per_node
    values = {"SLURM_NTASKS": tasks, "SLURM_NPROCS": tasks, "SLURM_NTASKS_PER_NODE": slurm.tasks_per_node}
    if slurm.gpus_per_node:
        values["SLURM_GPUS_PER_NODE"] = slurm.gpus_per_node
    if slurm.cpus_per_task is not None:
        values["SRUN_CPUS_PER_TASK"] = slurm.cpus_per_task
    return "export " + " ".join(f"{name}={value}" for name, value in values.items())


def _teardown(requested: SlurmConfig, root: Path) -> list[str]:
    command = [sys.executable, "-m", "tubelet.slurm.requeue", "--logs", str(logs(root))]
    return [f"exec {shlex.join(command)} --status $? --max-requeues {requested.max_requeues}"]


def _job(run: Run, root: Path) -> Job:
    return Job(
        run.package,
        fname=str((run.folder / "config.yaml").absolute()),
        logs=str(logs(root)),
        directory=str(Path.cwd()),
        on_cpu=run.slurm.device == "cpu",
        max_requeues=run.slurm.max_requeues,
    )


def _differ(runs: Sequence[Run]) -> bool:
    return any(run.slurm != runs[0].slurm for run in runs)


def _set_resources(submitted: Sequence[Submitted], runs: Sequence[Run]) -> None:
    """Lower the resources of each task of an array, which was submitted on hold with the largest, and release it."""
    array = submitted[0].job.split("_")[0]
    pairs = zip(submitted, runs, strict=True)
    commands = [["scontrol", "update", f"JobId={job.job}", *_job_parameters(run.slurm)] for job, run in pairs]
    for command in [*commands, ["scontrol", "release", array]]:
        scontrol = subprocess.run(command, capture_output=True, text=True)
        if scontrol.returncode:
            subprocess.run(["scancel", array], check=True)
            raise ConfigError(f"the array was cancelled: {shlex.join(command)} failed: {scontrol.stderr.strip()}")


def _job_parameters(slurm: SlurmConfig) -> list[str]:
    cores = slurm.cpus_per_task or 1
    return [
        f"NumNodes={slurm.nodes}-{slurm.nodes}",
        f"NumTasks={slurm.nodes * slurm.tasks_per_node}",
        f"NumCPUs={slurm.nodes * slurm.tasks_per_node * cores}",
        f"TasksPerNode={slurm.tasks_per_node}",
        f"CPUsPerTask={cores}",
        f"MinCPUsNode={slurm.tasks_per_node * cores}",
        f"TimeLimit={slurm.time}",
        *([f"TresPerNode=gres:gpu:{slurm.gpus_per_node}"] if slurm.gpus_per_node else []),
        *([f"Partition={slurm.partition}"] if slurm.partition else []),
        *([f"Account={slurm.account}"] if slurm.account else []),
        *([f"QOS={slurm.qos}"] if slurm.qos else []),
        *([f"ExcNodeList={slurm.exclude}"] if slurm.exclude else []),
    ]
