"""Run all benchmarks, or those named, e.g. `python -m benchmarks masks step`, and print one table."""

import argparse
import importlib

from benchmarks.harness import table

BENCHMARKS = (
    "masks",
    "step",
    "loader",
    "long_videos",
    "windows",
    "start_up",
    "packed",
    "storage",
    "attention",
    "weak_scaling",
)


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.names or BENCHMARKS:
        print(f"{name} …", flush=True)
        rows += importlib.import_module(f"benchmarks.{name}").run()
    print(table(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", type=_name, help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--threads", type=int, default=None, help="number of torch threads in this process")
    return parser


def _name(text: str) -> str:
    if text not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"unknown benchmark '{text}'; choose from {', '.join(BENCHMARKS)}")
    return text


if __name__ == "__main__":
    main()
