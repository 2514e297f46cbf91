"""Attentive (or linear) probe of a frozen encoder on labelled videos. `python -m evals.main --fname <yaml>`."""

from typing import Literal

from tubelet.probing.options import ProbeOptions
from tubelet.probing.run import run
from tubelet.runtime.distributed import World


class Options(ProbeOptions):
    eval_name: Literal["video_classification_frozen"]


def main(options: Options, world: World) -> None:
    """Writes `results.json`, `predictions.csv`, `confusion.png` and `probe.safetensors` into `options.folder`."""
    run(options, world)
