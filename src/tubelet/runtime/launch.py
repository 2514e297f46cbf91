"""Starts a program (`python -m app.main`, `python -m evals.main`): reads its YAML, starts one process per device.

A program is a module with `Options`, a subclass of `Config`, and `main(options, world)`. torch is imported only when a
program starts, so that `--help` is fast.
"""

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from tubelet.config import Config, ConfigError, check, nearest, read, shipped
from tubelet.runtime import command_line, run_lock, start_up
from tubelet.runtime.devices import parse as parse_devices
from tubelet.runtime.ending import Ending
from tubelet.runtime.log import setup_logging
from tubelet.runtime.parent import end_with_parent
from tubelet.runtime.signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

SAVE_SECONDS = 600.0
"""How long local processes may take to save after the first of them has exited because of a stop signal."""
END_SECONDS = 30.0
"""How long they may take to end, and to say which of them failed, after the first has failed."""


@dataclass(frozen=True)
class Package:
    """A package of programs, each a module `<name>.<program>.<module>`.

    Attributes:
        key: The key of the YAML file that names the program.
        configs: Folders of `configs` in which the name of a shipped configuration is looked up first.
    """

    name: str
    key: str
    module: str
    configs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A program's module and its validated options."""

    module: str
    options: Config

    def run(self, world: Any) -> None:
        """Run it in this process, which leaves its process group afterwards. `world`: see `distributed.World`.

        Rank 0 holds the lock of the folder meanwhile, see `run_lock`, and logs what has been done at the end.
        """
        from tubelet.runtime import distributed

        setup_logging(world.rank)
        try:
            with contextlib.ExitStack() as stack:
                locks = run_lock.holding(run_lock.locks_of(self.options))
                world.broadcast_from_rank0(lambda: stack.enter_context(locks))
                folder = getattr(self.options, "folder", None)
                ending = Ending(folder) if world.is_main and folder is not None else None
                importlib.import_module(self.module).main(self.options, world)
                if ending is not None and (line := ending.line()) is not None:
                    logger.info("%s", line)
        finally:
            distributed.shutdown()


def run(package: Package, argv: list[str] | None = None) -> None:
    """Parse the command line and run the program that the YAML file names."""
    arguments = _parse_arguments(package, argv)
    setup_logging()
    with command_line.exit_on_error():
        if arguments.help_config:
            program = _find_program(package, read(arguments.fname, arguments.overrides), arguments.fname)
            command_line.print_options(program.Options, arguments.fname, arguments.overrides)
            return
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


def _parse_arguments(package: Package, argv: list[str] | None) -> argparse.Namespace:
    module = f"{package.name}.main"
    parser = command_line.make_parser(
        module,
        "Run the program that the YAML file names, on one or several devices.",
        options="[--devices DEVICE …] [--processes N] [--help-config]",
        epilog=f"key.path=value replaces a value of the file, e.g. {command_line.typed(module)} --config x.yaml "
        "--devices cuda:0 cuda:1 folder=runs/mine optimization.lr=1e-3",
        configs=package.configs,
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="cpu, cuda, or cuda:0 cuda:1 …: one process each (default: the best)",
    )
    parser.add_argument("--processes", type=int, default=1, help="number of processes on --devices cpu (default: 1)")
    command_line.add_help_config(parser)
    return command_line.parse(parser, argv)


def _find_program(package: Package, raw: dict[str, Any], fname: str) -> Any:
    shipped.add_programs_to_path()  # jobs on a cluster start without the command `tubelet`
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

    default = "cuda" if torch.cuda.is_available() else "cpu"
    devices = parse_devices(arguments.devices or [default])
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

    Stop signals are forwarded to the children, once each, and the parent waits for the children to save and exit. The
    children get SIGTERM when the parent is killed.
    """
    from multiprocessing import get_context, resource_tracker

    from tubelet.runtime import distributed

    with run_lock.holding(run_lock.locks_of(program.options)):
        pass  # a folder that rank 0 could not lock is found before processes are started
    resource_tracker.ensure_running()  # it would unblock the signals
    # The children inherit the blocked signals: one that arrives while they start is delivered in `_run_rank`.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    context, address = get_context("spawn"), distributed.free_address()
    children = [
        context.Process(target=_run_rank, args=(rank, os.getpid(), program, devices, address), name=f"rank {rank}")
        for rank in range(len(devices))
    ]
    forwarding = _Forwarding(children)
    try:
        for child in children:
            child.start()
        with forwarding:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            status = _wait(children, forwarding)
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if status:
        sys.exit(status)


class _Forwarding:
    """Forwards the stop signals that this process gets to its children.

    Attributes:
        received: The signals, in their order.
    """

    def __init__(self, children: Sequence[BaseProcess]):
        self.children, self.received = children, list[int]()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Forwarding":
        self._previous = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        for child in self.children:
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, number)

    @property
    def abandoned(self) -> bool:
        """Whether a second Ctrl-C has come: the children are not to save."""
        return self.received.count(signal.SIGINT) > 1

    @property
    def seconds(self) -> float:
        """Time that the other children have to end after the first has: to save after a stop signal."""
        return SAVE_SECONDS if self.received and not self.abandoned else END_SECONDS


def _wait(children: Sequence[BaseProcess], forwarding: _Forwarding) -> int:
    """Wait for all children to end. Returns the exit status of the first that failed, 0 if none did.

    When one has failed, the others cannot go on; they are killed unless they end by themselves.
    """
    status, since = 0, time.monotonic()
    while running := [child for child in children if child.is_alive()]:
        wait([child.sentinel for child in running], timeout=1)
        failed = [child for child in children if child.exitcode]
        if failed and not status:
            status = _explain_exit(failed[0])
        if not failed and not forwarding.abandoned:
            since = time.monotonic()
        elif time.monotonic() - since > forwarding.seconds:
            for child in running:
                child.kill()
    return status


def _explain_exit(child: BaseProcess) -> int:
    """Return the exit status for that of a child. It has printed why it failed, unless a signal killed it."""
    code = child.exitcode or 0
    if code >= 0:
        return code
    if code == -signal.SIGKILL:
        hint = "; the kernel does so when memory is used up (see dmesg), and so do others with kill -9"
    else:
        hint = ""
    message = "error: %s (pid %s) was killed by %s%s"
    print(message % (child.name, child.pid, signal.Signals(-code).name, hint), file=sys.stderr, flush=True)
    return 128 - code


def _run_rank(rank: int, parent: int, program: Program, devices: list[str], address: str) -> None:
    start_up.finished()
    os.setsid()  # signals to the parent's process group, such as Ctrl-C, arrive once: through the parent
    end_with_parent(parent, signal.SIGTERM)

    import torch

    from tubelet.runtime import distributed

    if devices[rank] == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    with command_line.exit_on_error("stopped" if rank == 0 else ""):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        program.run(distributed.init(rank, len(devices), devices[rank], address))
