"""One process against two that train together, each on one thread with the same local batch: what do all-reduces cost?

The step is that of app/vjepa/train.py on clips of noise, so that only computing and the processes' messages are timed
(gloo, DDP). Two processes that train each by itself show what the machine allows: they share caches, memory and power.

    python -m benchmarks weak_scaling
"""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from app.vjepa.options import Options, Schedule
from app.vjepa.train import Pretraining
from benchmarks.harness import Row, in_turn, seconds
from tubelet.data import Batch
from tubelet.data.randomness import Purpose, generator
from tubelet.runtime import distributed
from tubelet.runtime.launch import Package, load

PRETRAINING = Package("app", key="app", module="train")
# A step of 0.1 s on one core with 0.6 million gradients to average, and one of 1.3 s with 2.6 million.
CONFIGURATIONS = ("configs/pretrain/demo.yaml", "configs/pretrain/real.yaml")
GOAL = 1.85


def run(repeats: int = 7, seconds_a_turn: float = 2.5) -> list[Row]:
    """Clips a second of two processes over those of one: together, and by themselves."""
    return [row for fname in CONFIGURATIONS for row in _of(fname, repeats, seconds_a_turn)]


def _of(fname: str, repeats: int, seconds_a_turn: float) -> list[Row]:
    options = load(PRETRAINING, fname, []).options
    rows = []
    with Crew([1], options) as alone:
        alone.train(1)
        steps = max(2, round(seconds_a_turn / seconds(lambda: alone.train(1))))
        clips = steps * options.data.batch_size
        for name, groups, goal in (("together", [2], GOAL), ("each by itself", [1, 1], None)):
            with Crew(groups, options) as two:
                timing = in_turn(lambda two=two: two.train(steps), lambda: alone.train(steps), repeats)
            rows.append(
                Row(
                    f"weak scaling, {fname}, batch {options.data.batch_size} each; 2 processes, {name}, against 1",
                    f"{2 * clips / timing.ours:.1f} clips/s",
                    f"{clips / timing.peer:.1f} clips/s",
                    2 * timing.ratio,
                    goal,
                )
            )
    return rows


class Crew:
    """In `with Crew(groups, options) as crew:` waiting processes, of which each group of so many trains together."""

    def __init__(self, groups: Sequence[int], options: Options):
        self.groups, self.options = groups, options
        self.processes: list[Any] = []
        self.ends: list[Connection] = []

    def train(self, steps: int) -> None:
        """Every process takes so many steps."""
        for end in self.ends:
            end.send(steps)
        for end in self.ends:
            end.recv()

    def __enter__(self) -> "Crew":
        context = multiprocessing.get_context("spawn")
        for size in self.groups:
            address = distributed.free_address()
            for rank in range(size):
                end, other = context.Pipe()
                arguments = (rank, size, address, self.options, other)
                self.processes.append(context.Process(target=_member, args=arguments, daemon=True))
                self.processes[-1].start()
                other.close()  # so that the end of a process is the end of its pipe
                self.ends.append(end)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        for end, process in zip(self.ends, self.processes, strict=True):
            if error is None:
                end.send(0)
            else:
                process.terminate()
        for process in self.processes:
            process.join()


def _member(rank: int, size: int, address: str, options: Options, orders: Connection) -> None:
    torch.set_num_threads(1)
    training = Pretraining(options, Schedule(options.optimization, 1), distributed.init(rank, size, "cpu", address))
    batch = make_batch(options)

    while steps := orders.recv():
        for _ in range(steps):
            training.set_hyperparameters()
            training.forward_backward(batch)
            training.update()
        orders.send("done")
    distributed.shutdown()


def make_batch(options: Options) -> Batch:
    """Clips of noise with the configuration's masks."""
    data, random = options.data, generator(options.meta.seed, Purpose.MASKS, 0, 0)
    shape = (data.batch_size, 3, data.num_frames, data.crop_size, data.crop_size)
    indices = torch.arange(data.batch_size)
    batch = Batch(
        clips=torch.from_numpy(random.integers(0, 256, shape, dtype="uint8")),
        labels=torch.zeros_like(indices),
        indices=indices,
        paths=("noise",) * data.batch_size,
        frames=torch.arange(data.num_frames).expand(data.batch_size, 1, -1),
        step=0,
    )
    return batch.with_masks(*options.mask_collator().sample_masks(data.batch_size, random))
