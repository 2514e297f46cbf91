"""What an encoder costs on the clips of its YAML: `python -m app.zoo.measure --fname configs/zoo/x.yaml --folder F`.

Writes `facts.json`: parameters; FLOPs of a forward pass and bytes kept for the backward pass, of one clip; clips/s of a
training step (forward and backward, batches of 16).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tubelet import config
from tubelet.config import UserError
from tubelet.data import DataConfig
from tubelet.models import ModelConfig, build_encoder
from tubelet.runtime.run_folder import write_atomic

BATCH_SIZE, REPEATS = 16, 5


def build(fname: str | Path) -> nn.Module:
    """The encoder of a pretraining's YAML. Raises ConfigError where its sections cannot be used."""
    raw = config.read(fname)
    model = config.check_part(raw.get("model", {}), ModelConfig, f"{fname}: model")
    data = config.check_part(raw.get("data", {}), DataConfig, f"{fname}: data")
    names = ("crop_size", "num_frames", "patch_size", "tubelet_size")
    return build_encoder(model, **{name: getattr(data, name) for name in names})


def facts(fname: str | Path) -> dict[str, float]:
    encoder = build(fname)
    data = encoder.built_from["data"]
    clips = torch.randn(BATCH_SIZE, 3, data["num_frames"], data["crop_size"], data["crop_size"])
    return {
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "flops": flops(encoder, clips[:1]),
        "bytes": kept_bytes(encoder, clips) / BATCH_SIZE,
        "clips_per_second": BATCH_SIZE / seconds_of_a_step(encoder, clips),
    }


def flops(encoder: nn.Module, clips: Tensor) -> int:
    """Of the matrix products of a forward pass; a multiplication and an addition are two."""
    # Without no_grad, in which the counter stumbles over modules that return a parameter.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(clips)
    return counter.get_total_flops()


def kept_bytes(encoder: nn.Module, clips: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = encoder(clips)  # noqa: F841, holds the graph, so that no memory is used twice
    return sum(kept.values())


def seconds_of_a_step(encoder: nn.Module, clips: Tensor) -> float:
    """Median of forward and backward passes after one that does not count."""
    taken = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        encoder(clips).mean().backward()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m app.zoo.measure", description=__doc__.split("\n\n")[0])
    parser.add_argument("--fname", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    try:
        write_atomic(arguments.folder / "facts.json", json.dumps(facts(arguments.fname), indent=1))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
