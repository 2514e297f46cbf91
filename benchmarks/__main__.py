"""All benchmarks, or those named, as `python -m benchmarks masks step`; prints one table."""

import argparse
import importlib

from benchmarks.harness import table

BENCHMARKS = ("masks", "step", "loader", "attention", "weak_scaling")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch in this process")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.names or BENCHMARKS:
        print(f"{name} …", flush=True)
        rows += importlib.import_module(f"benchmarks.{name}").run()
    print(table(rows))


if __name__ == "__main__":
    main()
