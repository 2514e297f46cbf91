"""Measures a training step: `python -m app.study.cost --fname configs/pretrain/x.yaml --folder F [key.path=value …]`.

Takes a few steps of the run that the YAML describes, on its data, and writes `cost.json`: `flops` of the matrix
products of a step (forward and backward pass; a multiplication and an addition count as two), `seconds` of a step,
without reading the data, and `clips` in a step.
"""

import statistics
import time
from pathlib import Path

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from app.vjepa.options import Options
from app.vjepa.train import make_batches, make_stream, make_trainer
from tubelet import config
from tubelet.data import Batch
from tubelet.runtime import command_line, devices, distributed
from tubelet.runtime.distributed import World
from tubelet.runtime.files import write_json
from tubelet.training.trainer import Trainer

COUNTED_STEPS = 2
"""Steps whose operations are counted: the number of visible tokens may differ between them."""
TIMED_STEPS = 8


def measure(options: Options, world: World) -> dict[str, float]:
    """Return the content of `cost.json`. The step is a real one, with update and EMA."""
    dataset, stream = make_stream(options, world)
    schedule = options.optimization.schedule(stream.steps_per_pass)
    trainer = make_trainer(options, schedule, world)
    batches = iter(make_batches(options, dataset, stream, world, range(COUNTED_STEPS + TIMED_STEPS)))
    flops = [step_flops(trainer, next(batches)) for _ in range(COUNTED_STEPS)]
    seconds = [step_seconds(trainer, batch) for batch in batches]
    return {
        "flops": statistics.fmean(flops),
        "seconds": statistics.median(seconds),
        "clips": options.data.batch_size * options.data.num_clips,
    }


def step_flops(trainer: Trainer, batch: Batch) -> int:
    """Take a step and return the FLOPs of its matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.train_step(batch)
    return counter.get_total_flops()


def step_seconds(trainer: Trainer, batch: Batch) -> float:
    """Take a step and return its duration."""
    start = time.perf_counter()
    float(trainer.train_step(batch)["loss"])  # waits for the device
    return time.perf_counter() - start


def main() -> None:
    parser = command_line.make_parser("app.study.cost", __doc__.split("\n\n")[0], options="--folder FOLDER")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    arguments = command_line.parse(parser)
    with command_line.exit_on_error():
        options = config.load(arguments.fname, [*arguments.overrides, f"folder={arguments.folder}"], Options)
        (device,) = devices.parse([arguments.device], "--device")
        measured = measure(options, distributed.init(0, 1, device, ""))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_json(arguments.folder / "cost.json", measured)


if __name__ == "__main__":
    main()
