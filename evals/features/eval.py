"""Features of all videos of a collection under a frozen encoder. `python -m evals.main --fname <yaml>`."""

from typing import Literal

from tubelet.features import extract
from tubelet.features.options import FeaturesOptions
from tubelet.runtime.distributed import World


class Options(FeaturesOptions):
    eval_name: Literal["features"]


def main(options: Options, world: World) -> None:
    """Writes `table/`, `tensors/`, `results.json` and, if any, `bad_files.txt` into `options.folder`."""
    extract.run(options, world)
