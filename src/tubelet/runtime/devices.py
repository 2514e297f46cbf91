"""Devices as the command line names them, and settings of CUDA that have to be made before it is used."""

import os
import re
from collections.abc import Sequence

from tubelet.config import ConfigError

FORMS = "cpu, cuda (the first GPU), or cuda:0 cuda:1 … with spaces between them"
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables of torch's allocator: the name since torch 2.9, and the one before, which it still reads."""


def parse(words: Sequence[str], option: str = "--devices") -> list[str]:
    """Return the device of each process, `cpu` or `cuda:<index>`.

    Args:
        words: What the user gave, one word for each process.
        option: Name of the option, for messages.

    Raises:
        ConfigError: A word names no device of this machine, one GPU is named twice, or CPU and GPUs are mixed.
    """
    import torch

    devices = ["cuda:0" if word == "cuda" else word for word in words]
    for word, device in zip(words, devices, strict=True):
        if not re.fullmatch(r"cpu|cuda:(0|[1-9]\d*)", device):
            raise ConfigError(f"{option} {word}: expected {FORMS}")
        if device != "cpu" and int(device.removeprefix("cuda:")) >= torch.cuda.device_count():
            raise ConfigError(f"{option} {word}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    gpus = [device for device in devices if device != "cpu"]
    if twice := sorted({gpu for gpu in gpus if gpus.count(gpu) > 1}):
        raise ConfigError(f"{option} {' '.join(words)}: {twice[0]} is named twice; name one GPU for each process")
    if gpus and len(gpus) < len(devices):
        raise ConfigError(f"{option} {' '.join(words)}: CPU and GPUs cannot train together; name only one kind")
    return devices


def expand_segments() -> None:
    """Let torch's CUDA allocator map memory piecewise, unless the user has set up the allocator.

    Batches differ in their number of tokens; blocks of fixed size then leave gaps of up to a third of the memory. torch
    reads the variable when it first allocates on a GPU.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def make_deterministic() -> None:
    """Use only algorithms whose results are the same, bit for bit, in every run with the same hardware and versions.

    Call it before the first product of matrices on a GPU. torch's attention then takes a deterministic backward pass.
    An operation that has no deterministic algorithm raises RuntimeError.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
