"""Weak scaling on the CPU: one process against two with DDP (gloo), each with one thread and the same local batch size.

Steps run on noise clips, so that only computation and communication are measured. Two independent processes show the
limit of the machine, because they share caches, memory bandwidth and power.

    python -m benchmarks weak_scaling
"""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from app.vjepa.options import Options
from app.vjepa.train import make_trainer
from benchmarks.harness import Row, seconds, time_alternately
from tubelet.data import Batch
from tubelet.runtime import distributed
from tubelet.runtime.launch import Package, load
from tubelet.runtime.seeds import Purpose, numpy_generator

PRETRAINING = Package("app", key="app", module="train")
# A step of 0.1 s on one core with 0.6 million trained parameters, and one of 1.3 s with 2.6 million.
CONFIGURATIONS = ("configs/pretrain/demo.yaml", "configs/pretrain/real.yaml")
GOAL = 1.85


def run(repeats: int = 7, seconds_per_run: float = 2.5) -> list[Row]:
    """Compare two processes, with and without communication, to a single one."""
    return [row for fname in CONFIGURATIONS for row in _measure(fname, repeats, seconds_per_run)]


def _measure(fname: str, repeats: int, seconds_per_run: float) -> list[Row]:
    options = load(PRETRAINING, fname, []).options
    rows = []
    with Workers([1], options) as single:
        single.train(1)
        steps = max(2, round(seconds_per_run / seconds(lambda: single.train(1))))
        clips = steps * options.data.batch_size
        for name, groups, goal in (("DDP", [2], GOAL), ("independent", [1, 1], None)):
            with Workers(groups, options) as two:
                timing = time_alternately(lambda two=two: two.train(steps), lambda: single.train(steps), repeats)
            rows.append(
                Row(
                    f"weak scaling, {fname}, local batch {options.data.batch_size}; 2 processes, {name}, against 1",
                    f"{2 * clips / timing.ours:.1f} clips/s",
                    f"{clips / timing.peer:.1f} clips/s",
                    2 * timing.ratio,
                    goal,
                )
            )
    return rows


class Workers:
    """Context manager of training processes that wait for `train`.

    Args:
        groups: Number of processes of each process group.
        options: Configuration of the pretraining.
    """

    def __init__(self, groups: Sequence[int], options: Options):
        self.groups, self.options = groups, options
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def train(self, steps: int) -> None:
        """Run this number of steps in every process and wait for all of them."""
        for connection in self.connections:
            connection.send(steps)
        for connection in self.connections:
            connection.recv()

    def __enter__(self) -> "Workers":
        context = multiprocessing.get_context("spawn")
        for size in self.groups:
            address = distributed.free_address()
            for rank in range(size):
                connection, worker_connection = context.Pipe()
                arguments = (rank, size, address, self.options, worker_connection)
                self.processes.append(context.Process(target=_work, args=arguments, daemon=True))
                self.processes[-1].start()
                worker_connection.close()  # so that the pipe closes when the process ends
                self.connections.append(connection)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            if error is None:
                connection.send(0)
            else:
                process.terminate()
        for process in self.processes:
            process.join()


def _work(rank: int, size: int, address: str, options: Options, connection: Connection) -> None:
    """Run the number of training steps that each message asks for; 0 ends the process."""
    torch.set_num_threads(1)
    world = distributed.init(rank, size, "cpu", address)
    trainer = make_trainer(options, options.optimization.schedule(1), world)
    batch = make_batch(options)

    while steps := connection.recv():
        for _ in range(steps):
            trainer.train_step(batch)
        connection.send("done")
    distributed.shutdown()


def make_batch(options: Options) -> Batch:
    """Return noise clips with the masks of the configuration."""
    data, random = options.data, numpy_generator(options.meta.seed, Purpose.MASKS, 0, 0)
    shape = (data.batch_size, 3, data.num_frames, data.crop_size, data.crop_size)
    indices = torch.arange(data.batch_size)
    batch = Batch(
        views={"clip": torch.from_numpy(random.integers(0, 256, shape, dtype="uint8"))},
        targets={"label": torch.zeros_like(indices)},
        indices=indices,
        paths=("noise",) * data.batch_size,
        frames=torch.arange(data.num_frames).expand(data.batch_size, 1, -1),
        step=0,
    )
    return batch.with_masks(*options.mask_collator().sample_masks(data.batch_size, random))
