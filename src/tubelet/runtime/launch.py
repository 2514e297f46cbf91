"""Starts a program (`python -m app.main`, `python -m evals.main`): reads its YAML, starts one process per device.

A program is a module with `Options`, a subclass of `Config`, and `main(options, world)`. torch is imported only when a
program starts, so that `--help` is fast.
"""

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tubelet.config import Config, ConfigError, check, nearest, read
from tubelet.runtime import command_line
from tubelet.runtime.log import setup_logging
from tubelet.runtime.signals import STOP_SIGNALS

SAVE_SECONDS = 600.0
"""How long local processes may take to save after the first of them has exited because of a stop signal."""


@dataclass(frozen=True)
class Package:
    """A package of programs, each a module `<name>.<program>.<module>`.

    Attributes:
        key: The key of the YAML file that names the program.
    """

    name: str
    key: str
    module: str


@dataclass(frozen=True)
class Program:
    """A program's module and its validated options."""

    module: str
    options: Config

    def run(self, world: Any) -> None:
        """Run it in this process, which leaves its process group afterwards. `world`: see `distributed.World`."""
        from tubelet.runtime import distributed

        setup_logging(world.rank)
        try:
            importlib.import_module(self.module).main(self.options, world)
        finally:
            distributed.shutdown()


def run(package: Package, argv: list[str] | None = None) -> None:
    """Parse the command line and run the program that the YAML file names."""
    arguments = _parse_arguments(package.name, argv)
    setup_logging()
    with command_line.exit_on_error():
        _start(load(package, arguments.fname, arguments.overrides), arguments)


def load(package: Package, fname: str, overrides: list[str]) -> Program:
    """The program that the file names, with its validated options. The section `slurm` is not validated.

    Raises:
        ConfigError: No such file or program, or invalid options.
    """
    raw = read(fname, overrides)
    raw.pop("slurm", None)  # see tubelet.slurm
    program = _find_program(package, raw, fname)
    return Program(program.__name__, check(raw, program.Options, fname))


def _parse_arguments(package: str, argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.make_parser(
        f"{package}.main",
        "Run the program that the YAML file names, on one or several devices.",
        options="[--devices DEVICE …] [--processes N]",
        epilog=f"key.path=value replaces a value of the file, e.g. python -m {package}.main --fname configs/x.yaml "
        "--devices cuda:0 cuda:1 folder=runs/mine optimization.lr=1e-3",
    )
    parser.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="cpu, or cuda:0 cuda:1 …: one process each (default: the best)"
    )
    parser.add_argument("--processes", type=int, default=1, help="number of processes on --devices cpu (default: 1)")
    return command_line.parse(parser, argv)


def _find_program(package: Package, raw: dict[str, Any], fname: str) -> Any:
    folders = importlib.import_module(package.name).__path__  # wherever it is run from
    programs = sorted(path.parent.name for folder in folders for path in Path(folder).glob(f"*/{package.module}.py"))
    name = raw.get(package.key)
    if name not in programs:
        problem = f"no program '{name}' in {package.name}/" if name else f"required: a program in {package.name}/"
        raise ConfigError(f"{fname}: {package.key}: {problem}. {nearest(str(name), programs)}")
    return importlib.import_module(f"{package.name}.{name}.{package.module}")


def _devices(arguments: argparse.Namespace) -> list[str]:
    """The device of each process: `cpu` or `cuda:<index>`."""
    import torch

    default = "cuda:0" if torch.cuda.is_available() else "cpu"
    devices = ["cuda:0" if device == "cuda" else device for device in arguments.devices or [default]]
    for device in devices:
        if not re.fullmatch(r"cpu|cuda:\d+", device):
            raise ConfigError(f"--devices {device}: expected cpu, or cuda:0 cuda:1 …, with spaces between them")
        if device.startswith("cuda") and torch.device(device).index >= torch.cuda.device_count():
            raise ConfigError(f"--devices {device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if arguments.processes > 1:
        if devices != ["cpu"]:
            raise ConfigError("--processes requires --devices cpu; on GPUs, name one device for each process")
        return ["cpu"] * arguments.processes
    return devices


def _start(program: Program, arguments: argparse.Namespace) -> None:
    from tubelet.runtime import distributed

    devices = _devices(arguments)
    explicit = arguments.devices is not None or arguments.processes > 1
    # An interactive shell of srun is a step with one task, too: there the command line decides.
    if distributed.world_size_from_environment() > 1 or not explicit:
        world = distributed.init_from_environment(on_cpu=devices[0] == "cpu")
    else:
        world = None
    if world is not None:
        program.run(world)
    elif len(devices) == 1:
        program.run(distributed.init(0, 1, devices[0], ""))
    else:
        _start_processes(program, devices)


def _start_processes(program: Program, devices: list[str]) -> None:
    """Run the program in one child process per device and exit with the status of the first that fails.

    Stop signals are forwarded to the children, once each, and the parent waits for the children to save and exit.
    """
    from multiprocessing import resource_tracker

    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    from tubelet.runtime import distributed

    resource_tracker.ensure_running()  # it would unblock the signals
    # The children inherit the blocked signals: one that arrives while they start is delivered in `_run_rank`.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        children = spawn(_run_rank, (program, devices, distributed.free_address()), nprocs=len(devices), join=False)
        with _forwarding_signals(children.processes) as forwarded:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            # The first child that exits after a stop signal must not end those that are still saving.
            while not children.join(timeout=1, grace_period=SAVE_SECONDS if forwarded else None):
                pass
    except ProcessExitedException as error:  # the child has printed why
        sys.exit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def _forwarding_signals(children: list[Any]) -> Iterator[list[int]]:
    forwarded: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        forwarded.append(number)
        for child in children:
            if child.is_alive():
                os.kill(child.pid, number)

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield forwarded
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run_rank(rank: int, program: Program, devices: list[str], address: str) -> None:
    import torch

    from tubelet.runtime import distributed

    os.setsid()  # signals to the parent's process group, such as Ctrl-C, arrive once: through the parent
    if devices[rank] == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    with command_line.exit_on_error("stopped" if rank == 0 else ""):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        program.run(distributed.init(rank, len(devices), devices[rank], address))
