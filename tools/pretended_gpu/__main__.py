"""Count what a training step does on the host and in torch's allocator, on a GPU that does not exist.

    python -m tools.pretended_gpu --fname configs/pretrain/vjepa_vitl16.yaml [key.path=value …]
    python -m tools.pretended_gpu --fname … --world-size 8 distributed=fsdp

Needs Linux, g++, binutils and a CUDA build of torch. docs/gpu.md says what the numbers mean.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.pretended_gpu.build import LIBRARY, CannotBuild, build
from tubelet.runtime.text import text_table


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_intermixed_args(argv)
    try:
        print(text_table(rows(measure(arguments), arguments.kernels)))
    except CannotBuild as error:
        sys.exit(f"error: {error}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run count.py with the pretended GPU and return what it has counted.

    Raises:
        CannotBuild: The runtime cannot be built here.
    """
    folder = build()
    environment = os.environ | {
        "LD_PRELOAD": str(folder / LIBRARY),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTORCH_CUDA_ALLOC_CONF": arguments.allocator,
        "PRETENDED_GPU_GIB": str(arguments.gib),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "counts.json"
        command = [sys.executable, "-m", "tools.pretended_gpu.count", "--fname", arguments.fname, "--out", str(out)]
        command += ["--steps", str(arguments.steps), "--world-size", str(arguments.world_size), *arguments.overrides]
        if subprocess.run(command, env=environment).returncode:
            sys.exit("error: the program on the pretended GPU failed, see above")
        return json.loads(out.read_text())


def rows(counts: dict[str, Any], kernels: int = 0) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    table = [("per step", "")]
    table += [(f"  {name}", f"{value:g}") for name, value in counts["per_step"].items()]
    table += [("memory", "")]
    table += [(f"  {name}", f"{value:.2f} GiB") for name, value in counts["memory"].items()]
    table += [("waits for the device", "" if counts["waits"] else "none")]
    table += [(f"  {wait['what']}, {wait['times']} times", wait["where"]) for wait in counts["waits"]]
    if counts["collectives"]:
        table += [("collectives per step", "")]
        table += [(f"  {name}", str(number)) for name, number in counts["collectives"].items()]
    if kernels:
        table += [("kernels per step", "")]
        table += [(f"  {kernel['per_step']:g}", kernel["name"][:150]) for kernel in counts["kernels"][:kernels]]
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pretended_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fname", required=True, help="YAML file of a pretraining")
    parser.add_argument("--steps", type=int, default=3, help="number of steps that are counted, after one more")
    parser.add_argument("--world-size", type=int, default=1, help="processes; only the first exists (default: 1)")
    parser.add_argument("--gib", type=float, default=80.0, help="memory of the GPU (default: %(default)g GiB)")
    parser.add_argument(
        "--allocator", default="", metavar="OPTIONS", help="PYTORCH_CUDA_ALLOC_CONF, e.g. expandable_segments:True"
    )
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="list the N kernels launched most often")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides a value of the file")
    return parser


if __name__ == "__main__":
    main()
