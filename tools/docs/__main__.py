"""Builds the documentation: `python -m tools.docs [--serve]`. Warnings, such as links to nowhere, are errors."""

import argparse
import os
import subprocess
import sys

from tools.docs.reference import ROOT, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__)
    parser.add_argument("--serve", action="store_true", help="serve the pages locally, and rebuild changed ones")
    serve = parser.parse_args().serve
    write(ROOT / "docs" / "reference")
    command = ["serve"] if serve else ["build", "--clean", "--strict"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    sys.exit(subprocess.run([sys.executable, "-m", "zensical", *command], cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
