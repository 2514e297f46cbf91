"""The probe of videos, on a folder of images with one subfolder a class. `python -m evals.main --fname <yaml>`."""

from typing import Literal

from pydantic import Field

from tubelet.data import DataFormat
from tubelet.probing.data_options import ProbeDataConfig
from tubelet.probing.options import ProbeOptions
from tubelet.probing.run import run
from tubelet.runtime.distributed import World


class DataConfig(ProbeDataConfig):
    format: DataFormat = Field({"name": "image_dataset"}, validate_default=True)


class Options(ProbeOptions):
    eval_name: Literal["image_classification_frozen"]
    data: DataConfig
    """Folders of images with a subfolder for each class."""


def main(options: Options, world: World) -> None:
    """Writes `results.json`, `predictions.csv`, `confusion.png` and `probe.safetensors` into `options.folder`."""
    run(options, world)
