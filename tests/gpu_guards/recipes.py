"""The published configurations of pretraining, without their data."""

import functools
from pathlib import Path

from app.main import PROGRAMS
from app.vjepa.options import Options
from tubelet.runtime.launch import load

FOLDER = Path(__file__).parents[2] / "configs/pretrain"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "base")


@functools.cache
def load_recipe(name: str, *overrides: str) -> Options:
    """Return the options of `configs/pretrain/<name>.yaml`."""
    return load(PROGRAMS, f"{FOLDER}/{name}.yaml", list(overrides)).options
