"""From checked runs to jobs in the queue: the sbatch script, the code, the array's own resources, `jobs.json`."""

import json
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
from tubelet.runtime.launch import Package, Program
from tubelet.runtime.run_folder import write_atomic
from tubelet.slurm.job import Job
from tubelet.slurm.options import SlurmConfig

# What `scontrol update` can change in one task of an array. All else is the same in all of its tasks.
OWN = {"partition", "account", "qos", "time", "nodes", "tasks_per_node", "cpus_per_task", "exclude"}


@dataclass(frozen=True)
class Run:
    """A program to be run in `folder`, and what it is given for that."""

    name: str
    package: Package
    program: Program
    slurm: SlurmConfig

    @property
    def folder(self) -> Path:
        return Path(self.program.options.folder)


@dataclass(frozen=True)
class Submitted:
    """A line of `jobs.json`."""

    job: str
    name: str
    folder: str
    after: str | None
    """The job whose good end it waits for."""
    submitted: float
    slurm: dict[str, Any]


class Executor(submitit.SlurmExecutor):
    """submitit's, but a script can be shown where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, tasks: int) -> str:
        """The sbatch script of an array of so many tasks, or of a single job."""
        self.parameters["map_count"] = tasks if tasks > 1 else None
        return self._make_submission_file_text(self._submitit_command_str, "")


def submit(runs: Sequence[Run], root: Path, code: Path, *, after: str | None = None) -> list[Submitted]:
    """Submit a run as one job, several as one array; `root/jobs.json` gets their ids, `root/slurm` what they print.

    `after`: the job whose good end they wait for; when it fails, they are removed from the queue.
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
    write_atomic(root / "jobs.json", json.dumps([asdict(job) for job in [*read_jobs(root), *submitted]], indent=1))
    if _differ(runs):
        _give_each_its_own(submitted, runs)
    return submitted


def script(runs: Sequence[Run], root: Path, *, after: str | None = None) -> str:
    """The sbatch script that `submit` would send."""
    return _executor(runs, root, root / "code", after).script(len(runs))


def read_jobs(root: Path) -> list[Submitted]:
    """All jobs that were submitted with the folder `root`, oldest first."""
    path = root / "jobs.json"
    return [Submitted(**line) for line in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def logs(root: Path) -> Path:
    """Where scripts, pickles, output and notes of a folder's jobs are."""
    return (root / "slurm").absolute()


def check_alike(runs: Sequence[Run]) -> None:
    """Raises ConfigError when runs differ in what all tasks of an array share."""
    first, *others = [run.slurm.model_dump(exclude=OWN) for run in runs]
    for run, other in zip(runs[1:], others, strict=True):
        if keys := [f"slurm.{key}" for key in first if first[key] != other[key]]:
            raise ConfigError(
                f"{run.name}: {', '.join(keys)} cannot differ from {runs[0].name} in one job array; "
                "submit it by itself, or give all the same"
            )


def _executor(runs: Sequence[Run], root: Path, code: Path, after: str | None) -> Executor:
    executor = Executor(folder=logs(root))
    # SLURM lets one lower what a waiting task was to have, but not raise it.
    most = {key: max(getattr(run.slurm, key) for run in runs) for key in ("time", "nodes", "tasks_per_node")}
    cores = [run.slurm.cpus_per_task for run in runs if run.slurm.cpus_per_task is not None]
    asked = runs[0].slurm.model_copy(update={**most, "cpus_per_task": max(cores, default=None)})
    more = {"requeue": True, **asked.sbatch}
    if after is not None:
        more["kill-on-invalid-dep"] = "yes"
    if _differ(runs):
        more["hold"] = True
    executor.update_parameters(
        job_name=runs[0].name if len(runs) == 1 else root.name,
        partition=asked.partition,
        account=asked.account,
        qos=asked.qos,
        time=asked.time,
        nodes=asked.nodes,
        ntasks_per_node=asked.tasks_per_node,
        cpus_per_task=asked.cpus_per_task,
        gpus_per_node=asked.gpus_per_node or None,
        mem_per_gpu=asked.mem_per_gpu,
        exclude=asked.exclude,
        dependency=f"afterok:{after}" if after else None,
        signal_delay_s=asked.warn_seconds,
        setup=_setup(runs, code.absolute()),
        srun_args=["--kill-on-bad-exit=1"],
        teardown=_teardown(asked, root),
        additional_parameters=more,
    )
    return executor


def _setup(runs: Sequence[Run], code: Path) -> list[str]:
    here = shlex.quote(str(code))
    lines = [
        "trap '' TERM  # the script outlives its processes, to decide whether the job starts again",
        f"cd {here} || exit 1",
        f"export PYTHONPATH={here}:{here}/src${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    if not _differ(runs):
        return [*lines, _srun_environment(runs[0].slurm)]
    cases = [f"  {task}) {_srun_environment(run.slurm)} ;;" for task, run in enumerate(runs)]
    return [*lines, "case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]


def _srun_environment(own: SlurmConfig) -> str:
    """sbatch's own variables say what the array was submitted with; srun needs what this task has."""
    tasks = own.nodes * own.tasks_per_node
    values = {"SLURM_NTASKS": tasks, "SLURM_NPROCS": tasks, "SLURM_NTASKS_PER_NODE": own.tasks_per_node}
    if own.gpus_per_node:
        values["SLURM_GPUS_PER_NODE"] = own.gpus_per_node
    if own.cpus_per_task is not None:
        values["SRUN_CPUS_PER_TASK"] = own.cpus_per_task
    return "export " + " ".join(f"{name}={value}" for name, value in values.items())


def _teardown(asked: SlurmConfig, root: Path) -> list[str]:
    command = [sys.executable, "-m", "tubelet.slurm.requeue", "--logs", str(logs(root))]
    return [f"exec {shlex.join(command)} --status $? --max-requeues {asked.max_requeues}"]


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


def _give_each_its_own(submitted: Sequence[Submitted], runs: Sequence[Run]) -> None:
    """An array is submitted on hold with the most that any task needs; then each gets its own, and all may start."""
    array = submitted[0].job.split("_")[0]
    pairs = zip(submitted, runs, strict=True)
    commands = [["scontrol", "update", f"JobId={job.job}", *_own(run.slurm)] for job, run in pairs]
    for command in [*commands, ["scontrol", "release", array]]:
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            subprocess.run(["scancel", array], check=True)
            raise ConfigError(f"the array was cancelled: {shlex.join(command)} failed: {said.stderr.strip()}")


def _own(slurm: SlurmConfig) -> list[str]:
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
