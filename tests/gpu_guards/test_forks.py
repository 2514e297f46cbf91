"""Jobs of a study are forks of a process that has imported the programs; they must still be able to use GPUs."""

import subprocess
import sys
from pathlib import Path

COUNTS_GPUS = """
import importlib
import torch

def count():
    raise AssertionError("asks CUDA for the number of GPUs, which its forks then cannot use")

torch._C._cuda_getDeviceCount = count
for program in ("vjepa", "generation", "language"):
    importlib.import_module(f"app.{program}.train")
for module in ("app.study.__main__", "evals.main", PROBE):
    importlib.import_module(module)
"""
PROBE = "evals.video_classification_frozen.eval"


def test_imports_leave_cuda_alone():
    command = [sys.executable, "-c", COUNTS_GPUS.replace("PROBE", repr(PROBE))]
    end = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
