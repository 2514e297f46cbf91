"""Measures the cost of an encoder: `python -m app.zoo.measure --fname configs/zoo/x.yaml --folder F`.

Writes `facts.json`: parameters; FLOPs of a forward pass and bytes kept for the backward pass, of one clip; clips/s of a
training step (forward and backward, batches of 16).
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tubelet import config
from tubelet.config import Config
from tubelet.data import DataConfig
from tubelet.grid import ClipShape
from tubelet.models import EncoderOptions, build_encoder
from tubelet.models.interfaces import Encoder
from tubelet.runtime import command_line
from tubelet.runtime.files import write_json

BATCH_SIZE, REPEATS = 16, 5


class Sections(Config):
    """The sections of a pretraining that describe its encoder."""

    encoder: EncoderOptions
    data: DataConfig


def build(fname: str | Path, overrides: Sequence[str] = ()) -> Encoder:
    """The encoder of a pretraining's YAML. Raises ConfigError if a section is invalid."""
    raw = config.read(fname, overrides)
    sections = config.check({key: raw[key] for key in ("encoder", "data") if key in raw}, Sections, fname)
    return build_encoder(sections.encoder, sections.data.clip_shape)


def facts(fname: str | Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Return the content of `facts.json`."""
    encoder = build(fname, overrides)
    clip = ClipShape(**encoder.built_from["clip"])
    clips = torch.randn(BATCH_SIZE, 3, clip.num_frames, clip.height, clip.width)
    return {
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "flops": flops(encoder, clips[:1]),
        "bytes": kept_bytes(encoder, clips) / BATCH_SIZE,
        "clips_per_second": BATCH_SIZE / step_seconds(encoder, clips),
    }


def flops(encoder: nn.Module, clips: Tensor) -> int:
    """FLOPs of the matrix products of a forward pass; a multiplication and an addition count as two."""
    # With gradients: under no_grad the counter fails for modules that return a parameter.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(clips)
    return counter.get_total_flops()


def kept_bytes(encoder: nn.Module, clips: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, int] = {}

    def record(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        output = encoder(clips)  # noqa: F841, keeps the graph alive, so that no memory is reused
    return sum(kept.values())


def step_seconds(encoder: nn.Module, clips: Tensor) -> float:
    """Median duration of a forward and backward pass, after one for warm-up."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        encoder(clips).mean().backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = command_line.make_parser("app.zoo.measure", __doc__.split("\n\n")[0], options="--folder FOLDER")
    parser.add_argument("--folder", type=Path, required=True)
    arguments = command_line.parse(parser)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with command_line.exit_on_error():
        write_json(arguments.folder / "facts.json", facts(arguments.fname, arguments.overrides))


if __name__ == "__main__":
    main()
