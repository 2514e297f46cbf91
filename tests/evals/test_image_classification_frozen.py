import copy
import json
from pathlib import Path

import pytest

from evals.image_classification_frozen import eval as program
from tubelet.config import ConfigError, check
from tubelet.runtime.distributed import World


def run(raw, images, **data):
    raw = copy.deepcopy(raw)
    raw["eval_name"] = "image_classification_frozen"
    raw["data"] |= {"dataset_train": str(images / "train"), "dataset_val": str(images / "val")}
    raw["data"] |= {"num_classes": 2, "num_segments": 1, **data}
    raw["optimization"] |= {"num_epochs": 20, "heads": None, "lr": 3e-3}
    program.main(check(raw, program.Options, "test.yaml"), World())
    return json.loads((Path(raw["folder"]) / "results.json").read_text())


@pytest.mark.parametrize("frames", [1, 4])
def test_colours_of_images_are_told_apart(raw, images, frames):
    """By an encoder of images, and by one of clips that sees an image repeated."""
    results = run(raw, images, frames_per_clip=frames)
    assert (results["top1"], results["num_train"], results["num_val"]) == (100, 16, 10)


def test_other_class_folders_in_validation_are_refused(raw, images, tmp_path):
    for name in ("green", "red"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes((images / "val" / "red" / "0.png").read_bytes())
    with pytest.raises(ConfigError, match="class folders"):
        run(raw, images, dataset_val=str(tmp_path / "val"))


def test_an_empty_class_folder_mends_that(raw, images, tmp_path):
    """As the message says."""
    for name in ("blue", "red"):
        (tmp_path / "val" / name).mkdir(parents=True)
    (tmp_path / "val" / "red" / "0.png").write_bytes((images / "val" / "red" / "0.png").read_bytes())
    assert run(raw, images, dataset_val=str(tmp_path / "val"))["top1"] == 100
