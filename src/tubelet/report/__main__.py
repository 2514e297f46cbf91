"""Write the report of a run folder, or of several runs side by side: `python -m tubelet.report runs/a [runs/b …]`."""

import argparse
from pathlib import Path

from tubelet import report
from tubelet.config import ConfigError
from tubelet.runtime import command_line
from tubelet.runtime.log import setup_logging


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=command_line.typed("tubelet.report"),
        description="Write the report of a training run or of a study, or a comparison of several runs.",
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="run folders")
    parser.add_argument("--folder", type=Path, dest="folders_option", metavar="FOLDER", help="another way to give one")
    parser.add_argument("--out", type=Path, help="folder of a comparison of several runs (default: that of the first)")
    arguments = parser.parse_args()
    folders = [*arguments.folders, *filter(None, [arguments.folders_option])]
    if not folders:
        parser.error("a run folder is missing")
    if arguments.out is not None and len(folders) == 1:
        parser.error("--out is for a comparison of several runs; the report of a single one is written to its folder")
    setup_logging()
    with command_line.exit_on_error():
        print(f"wrote {_write(folders, arguments.out)}")


def _write(folders: list[Path], out: Path | None) -> Path:
    if len(folders) > 1:
        return report.compare(folders, out or folders[0])
    folder = folders[0]
    if not any((folder / name).is_file() for name in ("config.yaml", "study.json")):
        raise ConfigError(f"{folder} is not a run folder: it has neither config.yaml nor study.json")
    return report.write(folder)


if __name__ == "__main__":
    main()
