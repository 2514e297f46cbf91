"""Write the report of a run folder anew: `python -m tubelet.report --folder runs/demo`."""

import argparse
import sys
from pathlib import Path

from tubelet import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tubelet.report", description=__doc__)
    parser.add_argument("--folder", required=True, type=Path, help="the folder of a pretraining run or of a study")
    folder = parser.parse_args().folder
    if not (folder / "config.yaml").is_file():
        sys.exit(f"error: {folder} is no run folder: it has no config.yaml")
    print(f"wrote {report.write(folder)}")


if __name__ == "__main__":
    main()
