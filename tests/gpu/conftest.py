"""Tests on one GPU: `make test-gpu`. TUBELET_TEST_DEVICE=cpu runs those that need no CUDA on the CPU against itself."""

import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks import noise
from tubelet.runtime.distributed import World

CPU = torch.device("cpu")
DEMO = [
    *("data.batch_size=4", "data.mask_batch_size=4", "data.crop_size=32", "logging.log_every=2", "meta.tf32=false"),
    *("encoder.embed_dim=64", "encoder.num_heads=2", "optimization.ipe=8"),
]
OBJECTIVES = {
    "vjepa": ("demo", []),
    "vjepa-rotary": ("demo", ["encoder.use_rope=true", "objective.predictor.use_rope=true"]),
    "vjepa-diffusion": ("vjepa_diffusion_demo", []),
    "vjepa2_1": ("vjepa2_1_demo", []),
    "videomae": ("videomae_demo", []),
    "lejepa": ("lejepa_demo", []),
    "levjepa": ("levjepa_demo", ["objective.token_drop=0", "data.mask_batch_size=null"]),
    "salt": (
        "salt_demo",
        [
            "objective.teacher={checkpoint: random, resolution: 32, frames_per_clip: 16, patch_size: 8, "
            "tubelet_size: 4, encoder: {name: vit_tiny, embed_dim: 48, depth: 2, num_heads: 2}}"
        ],
    ),
}


def pytest_report_header():
    """Name what the tests run on."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__}, no GPU"
    major, minor = torch.cuda.get_device_capability()
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()} (sm_{major}{minor})"


@pytest.fixture(scope="session")
def device():
    """The device that is compared with the CPU."""
    name = os.environ.get("TUBELET_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda:0" if name == "cuda" else name)


@pytest.fixture
def gpu(device):
    """The device, for tests that need CUDA itself."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def run(tmp_path):
    """`run(objective, device, *overrides)`: a tiny pretraining: its options, trainer and batches."""

    def make(objective, device, *overrides, folder="run", steps=4):
        name, extra = OBJECTIVES[objective]
        overrides = [*DEMO, *extra, *overrides]
        options = noise.read_options(f"configs/pretrain/{name}.yaml", overrides, str(tmp_path / folder))
        world = World(0, 1, device)
        batches = list(noise.batches(options, world, steps))
        return SimpleNamespace(options=options, trainer=noise.make_trainer(options, world), batches=batches)

    return make
