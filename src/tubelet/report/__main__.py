"""Write the report of a run folder: `python -m tubelet.report --folder runs/demo`."""

import argparse
import sys
from pathlib import Path

from tubelet import report
from tubelet.runtime import command_line
from tubelet.runtime.log import setup_logging


def main() -> None:
    parser = argparse.ArgumentParser(prog=command_line.typed("tubelet.report"), description=__doc__)
    parser.add_argument("--folder", required=True, type=Path, help="folder of a training run or of a study")
    folder = parser.parse_args().folder
    if not any((folder / name).is_file() for name in ("config.yaml", "study.json")):
        sys.exit(f"error: {folder} is not a run folder: it has neither config.yaml nor study.json")
    setup_logging()
    print(f"wrote {report.write(folder)}")


if __name__ == "__main__":
    main()
