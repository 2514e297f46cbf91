"""What `python -m app.main_distributed` and `python -m evals.main_distributed` share."""

import argparse
import dataclasses
import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from tubelet.config import ConfigError, UserError, check_part, dump, merge, read
from tubelet.runtime.launch import Package, load
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.slurm import cluster, snapshot, status
from tubelet.slurm.options import SlurmConfig
from tubelet.slurm.submit import Run, Submitted, check_alike, read_jobs, script, submit

SETTINGS = ("partition", "account", "qos", "time", "nodes", "tasks_per_node", "cpus_per_task", "mem_per_gpu", "exclude")
# What a probe takes over from its pretraining where its own file does not say it.
TAKEN_OVER = {"partition", "account", "qos", "exclude", "device"}


def run(package: Package, argv: list[str] | None = None, *, then: str | None = None) -> None:
    """Submit, watch or cancel. `then`: the module whose PROGRAMS `--then` submits after the run."""
    arguments = _arguments(package.name, sys.argv[1:] if argv is None else argv, then)
    try:
        if arguments.status:
            print(status.table(Path(arguments.status)))
        elif arguments.cancel:
            print(status.cancel(Path(arguments.cancel)))
        else:
            _submit(package, arguments, then)
    except UserError as error:
        sys.exit(f"error: {error}")


def _arguments(package: str, words: list[str], then: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}.main_distributed",
        usage="%(prog)s --fname FILE [options] [key.path=value …]",
        description="Submit the program that the YAML file names as a SLURM job. What the job is given may stand in "
        "the file's section `slurm`; the options here win.",
    )
    parser.add_argument("--fname", help="the YAML file with the configuration")
    parser.add_argument("--folder", help="run folder; with several runs, theirs are inside of it (default: the file's)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--time", type=int, metavar="MIN", help="limit of one stay on the nodes (default: 4300)")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--tasks-per-node", type=int, help="processes on each node, one a GPU")
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--mem-per-gpu", metavar="MEM", help="as 80G")
    parser.add_argument("--exclude", metavar="NODES", help="nodes not to use, as n[3-5],n8")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    parser.add_argument(
        "--batch-launch", nargs="?", const="", metavar="LIST", help="YAML list of configurations, for one job array"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B,C", help="a run for each value; several make a grid"
    )
    if then is not None:
        parser.add_argument("--then", metavar="FILE", help="probe to run when the run has ended well, on its encoder")
    parser.add_argument("--status", metavar="FOLDER", help="show the jobs that were submitted with this folder")
    parser.add_argument("--cancel", metavar="FOLDER", help="cancel them")
    arguments, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unknown: {' '.join(unknown)}")
    if not (arguments.fname or arguments.batch_launch or arguments.status or arguments.cancel):
        parser.error("--fname is missing")
    return argparse.Namespace(**vars(arguments), overrides=rest)


def _submit(package: Package, arguments: argparse.Namespace, then: str | None) -> None:
    root, runs = _runs(package, arguments)
    probes = [_probe(run, arguments.then, then) for run in runs] if then and arguments.then else []
    check_alike(runs)
    if arguments.dry_run:
        print(_preview(root, runs, probes))
        return
    known = cluster.nodes()
    for run in [*runs, *probes]:
        cluster.check(run.slurm, root, known)
        _check_same_run(run)
    _check_not_queued(root)
    code = snapshot.take(root)
    submitted = submit(runs, root, code)
    _announce(submitted)
    for job, probe in zip(submitted, probes, strict=False):
        _announce(submit([probe], root, code, after=job.job))
    print(f"Watch: python -m {package.name}.main_distributed --status {root}   cancel: --cancel {root}")


def _announce(submitted: list[Submitted]) -> None:
    for job in submitted:
        print(f"{job.job}  {job.name}  {job.folder}" + (f"  after {job.after}" if job.after else ""), flush=True)


def _runs(package: Package, arguments: argparse.Namespace) -> tuple[Path, list[Run]]:
    """The folder of all, and a run for each configuration of the list and each place of the grid."""
    fnames = [arguments.fname] if arguments.batch_launch is None else _listed(arguments.batch_launch or arguments.fname)
    root = arguments.folder
    if root is None and arguments.batch_launch is None:
        root = read(fnames[0], arguments.overrides).get("folder")
    if root is None:
        raise ConfigError("--folder is missing; several runs get a folder each inside of it")
    asked = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    runs = []
    for fname, place in itertools.product(fnames, _grid(arguments.sweep)):
        parts = [] if arguments.batch_launch is None else [Path(fname).stem]
        parts += [re.sub(r"[^\w.+-]+", "_", change.replace("=", "-")) for change in place]
        folder = Path(root, "_".join(parts)) if parts else Path(root)
        changes = [*arguments.overrides, *place]
        runs.append(_run(package, fname, changes, folder, asked, default={}))
    folders = [run.folder for run in runs]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
        raise ConfigError(f"several runs would write to {min(twice)}; give their files different names")
    return Path(root), runs


def _run(
    package: Package, fname: str, changes: list[str], folder: Path, asked: dict[str, Any], default: dict[str, Any]
) -> Run:
    """A run with its part of the cluster: what is `asked` wins over the file's section, that over the `default`."""
    program = load(package, fname, [*changes, f"folder={json.dumps(str(folder))}"])
    own = read(fname, changes).get("slurm") or {}
    slurm = check_part(merge(merge(default, own), asked), SlurmConfig, "slurm")
    minutes = _minutes_between_checkpoints(program.options.model_dump())
    if slurm.time - slurm.warn_seconds / 60 < minutes:
        raise ConfigError(
            f"slurm.time: of {slurm.time} minutes, {slurm.time - slurm.warn_seconds / 60:g} are left before the "
            f"warning, less than the {minutes:g} between two checkpoints; raise --time, or save more often"
        )
    return Run(folder.name, package, program, slurm)


def _probe(before: Run, fname: str, module: str) -> Run:
    """The probe of `--then` on the encoder of `before`, in a folder inside of that."""
    probes = importlib.import_module(module).PROGRAMS
    folder = before.folder / Path(fname).stem
    changes = [f"pretrain.folder={json.dumps(str(before.folder))}"]
    default = before.slurm.model_dump(include=TAKEN_OVER)
    run = _run(probes, fname, changes, folder, asked={}, default=default)
    return dataclasses.replace(run, name=f"{before.name}-{run.name}")


def _listed(fname: str) -> list[str]:
    path = Path(fname)
    listed = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"--batch-launch {fname}: expected a YAML file with a list of configuration files")
    return listed


def _grid(sweeps: list[str]) -> list[tuple[str, ...]]:
    """`["a=1,2", "b=[1,2],[3]"]` -> the changes of each place of the grid; one place without a change for no sweep."""
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not values:
            raise ConfigError(f"--sweep {sweep}: written key.path=a,b,c, as in --sweep optimization.lr=1e-4,1e-3")
        outside_brackets = r",(?![^\[{]*[\]}])"
        axes.append([f"{key}={value}" for value in re.split(outside_brackets, values)])
    return list(itertools.product(*axes))


def _minutes_between_checkpoints(options: Any) -> float:
    """What `logging.checkpoint_every_minutes` or `meta.save_every_minutes` says; 0 where a program has neither."""
    sections = options.values() if isinstance(options, dict) else ()
    own = [options[key] for key in ("checkpoint_every_minutes", "save_every_minutes") if sections and key in options]
    return max([*own, *map(_minutes_between_checkpoints, sections)], default=0)


def _check_same_run(run: Run) -> None:
    """As the program itself would do later, on the nodes."""
    free = getattr(importlib.import_module(run.program.module), "FREE", ("folder",))
    check_same_configuration(run.folder, run.program.options, free)


def _check_not_queued(root: Path) -> None:
    for job in read_jobs(root):
        if status.is_queued(root, job):
            raise ConfigError(f"{root}: its job {job.job} is still in the queue; --cancel {root} removes it")


def _preview(root: Path, runs: list[Run], probes: list[Run]) -> str:
    parts = []
    for run in [*runs, *probes]:
        asked = f"# {run.name}: {run.slurm.said()}"
        parts.append(f"{asked}\n# {run.folder / 'config.yaml'}\n{dump(run.program.options)}")
    parts.append(f"# sbatch\n{script(runs, root)}")
    for run, probe in zip(runs, probes, strict=False):
        parts.append(f"# sbatch, after {run.name}\n{script([probe], root, after='<its id>')}")
    return "\n".join([*parts, "# dry run: nothing was submitted or written"])
