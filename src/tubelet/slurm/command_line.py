"""Command line of `python -m app.main_distributed` and `python -m evals.main_distributed`."""

import argparse
import importlib
from pathlib import Path

from tubelet.runtime import command_line
from tubelet.runtime.launch import Package


def run(package: Package, argv: list[str] | None = None, *, then: str | None = None) -> None:
    """Submit, show or cancel jobs.

    Args:
        then: Module with the PROGRAMS that `--then` may submit after the run; None: there is no `--then`.
    """
    arguments = _parse_arguments(package, argv, then)
    with command_line.exit_on_error():
        from tubelet.slurm import runs, status  # they import torch, which `--help` need not wait for

        if arguments.status:
            print(status.table(Path(arguments.status)))
        elif arguments.cancel:
            print(status.cancel(Path(arguments.cancel)))
        else:
            runs.submit(package, arguments, then)


def _parse_arguments(package: Package, argv: list[str] | None, then: str | None) -> argparse.Namespace:
    parser = command_line.make_parser(
        f"{package.name}.main_distributed",
        "Submit the program that the YAML file names as a SLURM job. Its resources may be set in the section `slurm` "
        "of the file; the options here take precedence.",
        options="[options]",
        required=False,
        configs=package.configs,
    )
    parser.add_argument("--folder", help="run folder; several runs get a folder each in it (default: the file's)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--time", type=int, metavar="MIN", help="time limit; longer runs are requeued (default: 4300)")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--tasks-per-node", type=int, help="processes on each node, with one GPU each")
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--mem-per-gpu", metavar="MEM", help="host memory for each GPU, e.g. 80G")
    parser.add_argument("--exclude", metavar="NODES", help="nodes that are not used, e.g. n[3-5],n8")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    parser.add_argument(
        "--batch-launch", nargs="?", const="", metavar="LIST", help="YAML list of configurations, for one job array"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B,C", help="a run for each value; several make a grid"
    )
    if then is not None:
        probe = command_line.config_file(importlib.import_module(then).PROGRAMS.configs)
        parser.add_argument(
            "--then", metavar="FILE", type=probe, help="probe of the encoder, submitted to start after the run"
        )
    parser.add_argument("--status", metavar="FOLDER", help="show the jobs that were submitted with this folder")
    parser.add_argument("--cancel", metavar="FOLDER", help="cancel them")
    arguments = command_line.parse(parser, argv)
    if not (arguments.fname or arguments.batch_launch or arguments.status or arguments.cancel):
        parser.error("--config is missing")
    return arguments
