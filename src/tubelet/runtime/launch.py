"""What `python -m app.main` and `python -m evals.main` share: read the configuration, start one process a device.

A program is a module with `Options`, a subclass of `Config`, and `main(options, world)`. Torch is imported only when a
program starts, so that `--help` answers at once.
"""

import argparse
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.config import Config, ConfigError, UserError, check, nearest, read


@dataclass(frozen=True)
class Package:
    """A folder of programs: `<name>.<program>.<module>`, where the YAML's `key` says which program."""

    name: str
    key: str
    module: str


@dataclass(frozen=True)
class Program:
    """A program's module and its checked configuration."""

    module: str
    options: Config

    def run(self, world: Any) -> None:
        """Run it as the member `world` of its process group, which is left afterwards."""
        from tubelet.runtime import distributed

        try:
            importlib.import_module(self.module).main(self.options, world)
        finally:
            distributed.shutdown()


def run(package: Package, argv: list[str] | None = None) -> None:
    """Parse the command line and run the program that the YAML names."""
    arguments = _arguments(package.name, argv)
    try:
        _start(load(package, arguments.fname, arguments.overrides), arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def load(package: Package, fname: str, overrides: list[str]) -> Program:
    """The program that the file names, its configuration checked but for the section `slurm`. Raises ConfigError."""
    raw = read(fname, overrides)
    raw.pop("slurm", None)  # what a cluster is asked for; see tubelet.slurm
    program = _find_program(package, raw, fname)
    return Program(program.__name__, check(raw, program.Options, fname))


def _arguments(package: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}.main",
        usage="%(prog)s --fname FILE [--devices DEVICE …] [--processes N] [key.path=value …]",
        description="Run the program that the YAML file names, on one or several devices.",
        epilog=f"key.path=value replaces a value of the file, e.g. python -m {package}.main --fname configs/x.yaml "
        "--devices cuda:0 cuda:1 folder=runs/mine optimization.lr=1e-3",
    )
    parser.add_argument("--fname", required=True, help="the YAML file with the configuration")
    parser.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="cpu, or cuda:0 cuda:1 …: one process each (default: the best)"
    )
    parser.add_argument("--processes", type=int, default=1, help="number of processes on --devices cpu (default: 1)")
    # Overrides are taken out first: they may follow `--devices cpu`, which would otherwise swallow them.
    words = sys.argv[1:] if argv is None else argv
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    arguments = parser.parse_args([word for word in words if word not in overrides])
    return argparse.Namespace(**vars(arguments), overrides=overrides)


def _find_program(package: Package, raw: dict[str, Any], fname: str) -> Any:
    programs = sorted(path.parent.name for path in Path(package.name).glob(f"*/{package.module}.py"))
    name = raw.get(package.key)
    if name not in programs:
        said = f"{package.key}: '{name}' is no program" if name else f"{package.key}: required, but not given"
        raise ConfigError(f"{fname}: {said} in {package.name}/. {nearest(str(name), programs)}")
    return importlib.import_module(f"{package.name}.{name}.{package.module}")


def _devices(arguments: argparse.Namespace) -> list[str]:
    import torch

    devices = arguments.devices or ["cuda:0" if torch.cuda.is_available() else "cpu"]
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ConfigError(f"--devices {device}: expected cpu, or cuda:0 cuda:1 …, with spaces between them")
        index = torch.device(device).index or 0
        if device.startswith("cuda") and index >= torch.cuda.device_count():
            raise ConfigError(f"--devices {device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if arguments.processes > 1:
        if devices != ["cpu"]:
            raise ConfigError("--processes goes with --devices cpu; on GPUs, name one device for each process")
        return ["cpu"] * arguments.processes
    return devices


def _start(program: Program, arguments: argparse.Namespace) -> None:
    from tubelet.runtime import distributed

    devices = _devices(arguments)
    asked = arguments.devices is not None or arguments.processes > 1
    # A shell on a node that srun has started is a place, too, of one process; there counts what is asked for.
    if distributed.size_from_environment() > 1 or not asked:
        world = distributed.init_from_environment(on_cpu=devices[0] == "cpu")
    else:
        world = None
    if world is not None:
        program.run(world)
    elif len(devices) == 1:
        program.run(distributed.init(0, 1, devices[0], ""))
    else:
        from torch.multiprocessing.spawn import ProcessExitedException, spawn

        try:
            spawn(_run_rank, (program, devices, distributed.free_address()), nprocs=len(devices))
        except ProcessExitedException as error:  # it has said why
            sys.exit(error.exit_code)


def _run_rank(rank: int, program: Program, devices: list[str], address: str) -> None:
    import torch

    from tubelet.runtime import distributed

    if devices[rank] == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // len(devices)))
    try:
        program.run(distributed.init(rank, len(devices), devices[rank], address))
    except UserError as error:
        sys.exit(f"error: {error}")
