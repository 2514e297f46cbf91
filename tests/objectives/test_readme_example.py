"""The objective in README.md is copied into a package outside of tubelet and trained."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from app.vjepa.options import Options
from app.vjepa.train import main
from tubelet import config, hub
from tubelet.config import ConfigError
from tubelet.data.generated import Settings, write_dataset
from tubelet.runtime.distributed import World

README = Path(__file__).parents[2] / "README.md"
MASK = {"name": "multiblock3d", "num_blocks": 1, "spatial_scale": [0.5, 0.5]}


@pytest.fixture
def name(tmp_path, monkeypatch):
    """Dotted name of the objective's module, written to the path that is the first line of its code."""
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "build(" in block
    )
    path = tmp_path / "readme" / code.splitlines()[0].removeprefix("# ")
    path.parent.mkdir(parents=True)
    path.write_text(code)
    package = path.parent.name
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(path.parents[1]))
    yield f"{package}.{path.stem}"
    for module in (package, f"{package}.{path.stem}"):
        sys.modules.pop(module, None)


def make_options(folder, **sections):
    raw = {
        "app": "vjepa",
        "folder": str(folder / "run"),
        "encoder": {"name": "vit_tiny", "embed_dim": 48, "depth": 2, "num_heads": 2},
        "mask": [MASK, MASK],
        "data": {
            "datasets": [str(folder / "clips" / "pretrain")], "batch_size": 4, "num_workers": 0, "num_frames": 8,
            "sampling_rate": 1, "crop_size": 32, "patch_size": 8,
        },
        "optimization": {"epochs": 1, "ipe": 2, "warmup": 0, "start_lr": 1e-3, "lr": 1e-3},
        "meta": {"dtype": "float32"},
        "logging": {"monitor_clips": 4},
    }  # fmt: skip
    return config.check(raw | sections, Options, "the options")


def test_objective_of_the_readme_trains(name, tmp_path):
    write_dataset(tmp_path / "clips", Settings(clips=4, train=8, test=8, frames=8, size=32), processes=1)
    options = make_options(tmp_path, objective={"name": name, "cov_coeff": 0.5})
    assert options.objective.model_dump() == {"name": name, "inv_coeff": 25.0, "cov_coeff": 0.5}
    main(options, World())

    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, last = lines[1:]
    assert first["loss"] == pytest.approx(25 * (first["loss_inv"] + first["loss_std"]) + 0.5 * first["loss_cov"])
    assert math.isfinite(last["loss"])
    assert last["loss"] != first["loss"]
    assert hub.load_encoder(tmp_path / "run").embed_dim == 48
    with pytest.raises(ConfigError, match=r"objective\.cov_coef: unknown key\. Did you mean 'cov_coeff'"):
        make_options(tmp_path, objective={"name": name, "cov_coef": 0.5})
    with pytest.raises(ConfigError, match="needs at least 2 mask"):
        make_options(tmp_path, objective=name, mask=[MASK])
