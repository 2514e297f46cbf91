"""The runs of a command line: their configurations, resources and folders; checks before they are submitted."""

import argparse
import dataclasses
import importlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError, check_part, dump, merge, read
from tubelet.config.yaml_files import read_yaml
from tubelet.runtime import command_line
from tubelet.runtime.launch import Package, load
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.slurm import cluster, snapshot, status
from tubelet.slurm import submit as jobs
from tubelet.slurm.options import SlurmConfig
from tubelet.slurm.submit import Run, Submitted

OPTIONS = ("partition", "account", "qos", "time", "nodes", "tasks_per_node", "cpus_per_task", "mem_per_gpu", "exclude")
INHERITED = {"partition", "account", "qos", "exclude", "device"}
"""Resources that a probe takes from its pretraining, unless its own file sets them."""


def submit(package: Package, arguments: argparse.Namespace, then: str | None) -> None:
    """Check and submit the runs and their probes and print their jobs; or show them, with `--dry-run`."""
    root, runs = _runs(package, arguments)
    probes = [_probe(run, arguments.then, then) for run in runs] if then and arguments.then else []
    jobs.check_array(runs)
    if arguments.dry_run:
        print(_preview(root, runs, probes))
        return
    nodes = cluster.nodes()
    for run in [*runs, *probes]:
        cluster.check(run.slurm, root, nodes)
        _check_same_run(run)
    _check_not_queued(root)
    code = snapshot.take(root)
    submitted = jobs.submit(runs, root, code)
    _print(submitted)
    for job, probe in zip(submitted, probes, strict=False):
        _print(jobs.submit([probe], root, code, after=job.job))
    command = command_line.typed(f"{package.name}.main_distributed")
    print(f"Watch: {command} --status {root}   cancel: --cancel {root}")


def _print(submitted: list[Submitted]) -> None:
    for job in submitted:
        print(f"{job.job}  {job.name}  {job.folder}" + (f"  after {job.after}" if job.after else ""), flush=True)


def _runs(package: Package, arguments: argparse.Namespace) -> tuple[Path, list[Run]]:
    """The folder of all runs, and a run for each configuration and each point of the grid."""
    fnames = [arguments.fname] if arguments.batch_launch is None else _listed(arguments.batch_launch or arguments.fname)
    root = arguments.folder
    if root is None and arguments.batch_launch is None:
        root = read(fnames[0], arguments.overrides).get("folder")
    if root is None:
        raise ConfigError("--folder is missing; several runs get a folder each in it")
    requested = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    runs = []
    for fname, point in itertools.product(fnames, _grid(arguments.sweep)):
        parts = [] if arguments.batch_launch is None else [Path(fname).stem]
        parts += [re.sub(r"[^\w.+-]+", "_", change.replace("=", "-")) for change in point]
        folder = Path(root, "_".join(parts)) if parts else Path(root)
        changes = [*arguments.overrides, *point]
        runs.append(_run(package, fname, changes, folder, requested, default={}))
    folders = [run.folder for run in runs]
    if duplicates := {folder for folder in folders if folders.count(folder) > 1}:
        raise ConfigError(f"several runs would write to {min(duplicates)}; give their files different names")
    return Path(root), runs


def _run(
    package: Package, fname: str, changes: list[str], folder: Path, requested: dict[str, Any], default: dict[str, Any]
) -> Run:
    """A run with its resources: `requested` overrides the section of the file, which overrides `default`."""
    program = load(package, fname, [*changes, f"folder={json.dumps(str(folder))}"])
    section = read(fname, changes).get("slurm") or {}
    slurm = check_part(merge(merge(default, section), requested), SlurmConfig, "slurm")
    minutes = _minutes_between_checkpoints(program.options.model_dump())
    if slurm.time - slurm.warn_seconds / 60 < minutes:
        raise ConfigError(
            f"slurm.time: of {slurm.time} minutes, {slurm.time - slurm.warn_seconds / 60:g} remain before the "
            f"stop signal, less than the {minutes:g} between two checkpoints. Increase --time, or save more often"
        )
    return Run(folder.name, folder, package, program, slurm)


def _probe(before: Run, fname: str, module: str) -> Run:
    """The probe of `--then` of the encoder of `before`, in a subfolder of its folder."""
    probes = importlib.import_module(module).PROGRAMS
    folder = before.folder / Path(fname).stem
    changes = [f"pretrain.folder={json.dumps(str(before.folder))}"]
    default = before.slurm.model_dump(include=INHERITED)
    run = _run(probes, fname, changes, folder, requested={}, default=default)
    return dataclasses.replace(run, name=f"{before.name}-{run.name}")


def _listed(fname: str) -> list[str]:
    path = Path(fname)
    listed = read_yaml(path) if path.is_file() else None
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"--batch-launch {fname}: expected a YAML file with a list of configuration files")
    return listed


def _grid(sweeps: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each point of the grid; a single point without overrides if there are no sweeps.

    Example:
        >>> _grid(["a=1,2", "b=[1,2],[3]"])
        [("a=1", "b=[1,2]"), ("a=1", "b=[3]"), ("a=2", "b=[1,2]"), ("a=2", "b=[3]")]
    """
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not values:
            raise ConfigError(f"--sweep {sweep}: expected key.path=a,b,c, e.g. --sweep optimization.lr=1e-4,1e-3")
        outside_brackets = r",(?![^\[{]*[\]}])"
        axes.append([f"{key}={value}" for value in re.split(outside_brackets, values)])
    return list(itertools.product(*axes))


def _minutes_between_checkpoints(options: Any) -> float:
    """`logging.checkpoint_every_minutes` or `meta.save_every_minutes`; 0 if the program has neither."""
    sections = options.values() if isinstance(options, dict) else ()
    here = [options[key] for key in ("checkpoint_every_minutes", "save_every_minutes") if sections and key in options]
    return max([*here, *map(_minutes_between_checkpoints, sections)], default=0)


def _check_same_run(run: Run) -> None:
    """Raise ConfigError if the folder has a run of another configuration, as the program would when it starts."""
    check_same_configuration(run.folder, run.program.options)


def _check_not_queued(root: Path) -> None:
    for job in jobs.read_jobs(root):
        if status.is_queued(root, job):
            raise ConfigError(f"{root}: its job {job.job} is still in the queue; cancel it with --cancel {root}")


def _preview(root: Path, runs: list[Run], probes: list[Run]) -> str:
    parts = []
    for run in [*runs, *probes]:
        parts.append(f"# {run.name}: {run.slurm.summary()}")
        parts.append(f"# {run.folder / 'config.yaml'}\n{dump(run.program.options)}")
    parts.append(f"# sbatch\n{jobs.script(runs, root)}")
    for run, probe in zip(runs, probes, strict=False):
        parts.append(f"# sbatch, after {run.name}\n{jobs.script([probe], root, after='<its id>')}")
    return "\n".join([*parts, "# dry run: nothing was submitted or written"])
