"""Measure training on one GPU; ends by its own deadline and writes results.json and results.md.

python -m benchmarks.gpu --out runs/bench_gpu
python -m benchmarks.gpu --out runs/bench_gpu demo     # one section, with all the time
python -m benchmarks.gpu --device cpu --size tiny      # shows that the code runs, in a minute
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import results
from benchmarks.gpu.results import Record
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.session import GIB, Session

GRACE_SECONDS = 10  # that a section has to end after SIGTERM
PACKAGES = ("torch", "triton", "transformers", "numpy", "pydantic", "timm", "av")


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU; --device cpu --size tiny shows on a CPU that the code runs")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.records is not None:
        _run_here(arguments)
    else:
        run(arguments)


def run(arguments: argparse.Namespace) -> list[Record]:
    """Run the sections one after another in processes of their own; write all results after each."""
    deadline = time.monotonic() + arguments.seconds
    environment, records = describe(arguments), []
    names = arguments.names or list(SECTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(names):
            section = SECTIONS[name]
            promised = sum(SECTIONS[later].least for later in names[number + 1 :])
            left = deadline - time.monotonic()
            most = left if len(names) == 1 else min(section.most, max(section.least, left - promised))
            if left < min(section.least, most):
                records.append(Record(name, "", note=f"skipped: {left:.0f} s left, it needs {section.least:.0f} s"))
            else:
                print(f"{name} (at most {min(most, left):.0f} s)", flush=True)
                records += _run_section(name, min(most, left), arguments, Path(scratch) / name)
            results.write(arguments.out, environment, records)
    print(results.markdown(environment, records))
    print(f"wrote {arguments.out}/results.json and results.md")
    return records


def _run_section(name: str, seconds: float, arguments: argparse.Namespace, scratch: Path) -> list[Record]:
    """Run a section in a child process and return its records; one says how it ended, if not well."""
    scratch.mkdir()
    path, log = scratch / "records.jsonl", scratch / "output.log"
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--records", str(path), "--seconds", str(seconds)]
    command += ["--device", arguments.device, "--size", arguments.size, "--out", str(arguments.out)]
    # A process group of its own: workers and compilers end with it.
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        end = _wait(process, seconds)
    print(log.read_text(errors="replace"), end="", flush=True)
    records = results.read(path)
    if end:
        lines = log.read_text(errors="replace").splitlines()[-30:]
        records.append(Record(name, "", note=end, details={"log": lines}))
    return records


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for the process and stop it when its time is over; return how it ended, "" if well."""
    try:
        code = process.wait(max(1.0, seconds - GRACE_SECONDS))
        return "" if code == 0 else f"failed with exit code {code}; results.json has the last lines of its output"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"stopped after {seconds:.0f} s"


def _run_here(arguments: argparse.Namespace) -> None:
    """Run one section in this process."""
    (name,) = arguments.names
    device = torch.device("cuda:0" if arguments.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as scratch:
        deadline = time.monotonic() + arguments.seconds - GRACE_SECONDS
        tiny = arguments.size == "tiny"
        session = Session(name, device, tiny, deadline, arguments.records, Path(scratch), arguments.out)
        SECTIONS[name].run(session)
    sys.exit(1 if session.failed else 0)


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the results depend on."""
    facts = {
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "command": f"--device {arguments.device} --size {arguments.size} --seconds {arguments.seconds:g}",
        "python": platform.python_version(),
        "CPU cores": len(os.sched_getaffinity(0)),
        **{package: _version(package) for package in PACKAGES},
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default options"),
    }
    if arguments.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "GPU": properties.name,
            "memory, GiB": round(properties.total_memory / GIB, 1),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*SECTIONS, []], metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu"), help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--seconds", type=float, default=525.0, help="time for everything (default: %(default)g)")
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)  # set for the process of a section
    return parser


if __name__ == "__main__":
    main()
