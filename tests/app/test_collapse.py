"""Runs that are made to collapse by a wrong option are reported, healthy ones are not, with every shipped objective."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from app.vjepa.options import Options
from app.vjepa.train import main
from tubelet import config
from tubelet.runtime.distributed import World
from tubelet.runtime.run_folder import read_log
from tubelet.training.callbacks import RunStopped

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
SMALL = ["encoder.embed_dim=64", "encoder.depth=2", "encoder.num_heads=2", "data.batch_size=16"]
SMALL += ["optimization.epochs=4", "optimization.ipe=50", "logging.monitor_every=50", "logging.monitor_clips=128"]
PREDICTOR = ["objective.predictor.depth=1", "objective.predictor.embed_dim=48"]
SUPERVISED = ["objective={name: supervised, num_classes: 8}", "mask=[]"]
ENCODER = "{name: vit_tiny, embed_dim: 64, depth: 2, num_heads: 2, init_std: 0.12}"
TEACHER = f"objective.teacher={{checkpoint: random, encoder: {ENCODER}, patch_size: 8, tubelet_size: 4}}"
NO_EMA = ["objective.ema=[0, 0]", "objective.std_coeff=0", "objective.cov_coeff=0", "objective.inv_coeff=0"]
NO_EMA += ["optimization.lr=1e-2"]
FAILS = ["optimization.lr=1", "optimization.clip_grad=null"]
ONE_VECTOR, FEW_DIRECTIONS = {"complete", "drift"}, {"dimensional"}

# Name -> configuration, overrides that make it small, those that make it collapse, kinds of which one is then reported.
CASES = {
    "vjepa, invariance": ("demo.yaml", PREDICTOR, ["objective.inv_coeff=300"], ONE_VECTOR),
    "vjepa, momentum": ("demo.yaml", PREDICTOR, NO_EMA, ONE_VECTOR),
    "vjepa, diffusion": ("vjepa_diffusion_demo.yaml", PREDICTOR, NO_EMA, ONE_VECTOR | FEW_DIRECTIONS),
    "vjepa2_1": ("vjepa2_1_demo.yaml", [*PREDICTOR, "encoder.depth=4"], NO_EMA, ONE_VECTOR | FEW_DIRECTIONS),
    "levjepa": ("levjepa_demo.yaml", [], ["objective.sigreg_coeff=0"], FEW_DIRECTIONS),
    "lejepa": ("lejepa_demo.yaml", PREDICTOR, ["objective.sigreg_coeff=0"], FEW_DIRECTIONS),
    "videomae": ("videomae_demo.yaml", ["objective.decoder.depth=1"], FAILS, ONE_VECTOR),
    "salt": ("salt_demo.yaml", [*PREDICTOR, TEACHER], FAILS, ONE_VECTOR),
    "supervised": ("demo.yaml", SUPERVISED, FAILS, ONE_VECTOR),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of 160 generated clips and the list of their labels."""
    folder = tmp_path_factory.mktemp("clips")
    counts = ["--clips", "2", "--train", "160", "--test", "8", "--size", "40"]
    command = [sys.executable, "-m", "tubelet.data.generated", "--folder", str(folder), *counts]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("collapses", [False, True], ids=["healthy", "collapses"])
def test_collapse_is_reported_and_learning_is_not(name, collapses, data, tmp_path):
    file, small, wrong, kinds = CASES[name]
    overrides = [f"folder={tmp_path / 'run'}", f"data.datasets=[{data / 'motion_train.csv'}]", f"data.cache={data}"]
    overrides += [*SMALL, *small, *(wrong if collapses else [])]
    may_stop = collapses and wrong is FAILS  # losses are not finite in the end
    with contextlib.suppress(RunStopped) if may_stop else contextlib.nullcontext():
        main(config.load(CONFIGS / file, overrides, Options), World())
    reported = {kind for line in read_log(tmp_path / "run") for kind in line.get("events", {})}
    assert reported <= (kinds if collapses else set())
    assert bool(reported) == collapses
