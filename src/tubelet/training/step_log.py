"""Metrics of each step, read from the device once for many steps."""

import resource
import socket
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from tubelet.runtime.distributed import World


class StepLog:
    """Keeps the metrics of the steps on the device until `flush` reads them all at once.

    Args:
        world: The processes of the run.
    """

    def __init__(self, world: World):
        self.world = world
        self.hosts: list[str] = world.all_gather_object(socket.gethostname())
        self._numbers: list[dict[str, Any]] = []
        self._tensors: list[dict[str, Tensor]] = []
        self._before: list[dict[str, Any]] = []
        self._since = time.perf_counter()

    def add(self, numbers: dict[str, float], tensors: dict[str, Tensor]) -> None:
        """Add the metrics of a step.

        Args:
            numbers: Metrics that are known on the host.
            tensors: Scalars on the device, which may still be being computed.
        """
        self._numbers.append(numbers)
        self._tensors.append(tensors)

    def amend(self, numbers: dict[str, Any]) -> None:
        """Add `numbers` to the last step; before the first step they become a line of their own.

        Besides numbers there may be `events`: name -> message.
        """
        if self._numbers:
            self._numbers[-1] |= numbers
        else:
            self._before.append(numbers)

    def flush(self, clips_per_step: int) -> list[dict[str, Any]]:
        """Return the metrics of each step since the last call. Waits for the device; all processes have to call it.

        Args:
            clips_per_step: Clips of a step in all processes together.

        Returns:
            One dictionary for each step. Tensors are averaged over the processes. `step_seconds`, `clips_per_second`
            and `memory_gb` (GiB) are those since the last call. With several processes there are also the mean and
            the maximum over the processes of `step_seconds` and `data_seconds` (waiting for data), and the rank with
            the longest wait.
        """
        if not self._tensors:
            return []
        names = list(self._tensors[0])
        stacked = torch.stack([torch.stack([t[name].detach().float() for name in names]) for t in self._tensors])
        rows = self.world.mean(stacked).tolist()
        seconds = (time.perf_counter() - self._since) / len(rows)
        speed = {
            "step_seconds": seconds,
            "clips_per_second": clips_per_step / seconds,
            "memory_gb": peak_memory_gb(self.world.device),
        }
        if self.world.world_size > 1:
            speed |= self._over_processes(seconds)
        lines = self._before + [
            {**numbers, **dict(zip(names, row, strict=True)), **speed}
            for numbers, row in zip(self._numbers, rows, strict=True)
        ]
        self._before, self._numbers, self._tensors, self._since = [], [], [], time.perf_counter()
        return lines

    def _over_processes(self, step_seconds: float) -> dict[str, float]:
        data_seconds = statistics.mean(numbers["data_seconds"] for numbers in self._numbers)
        steps, waits = zip(*self.world.all_gather_object((step_seconds, data_seconds)), strict=True)
        return {
            "step_seconds_mean": statistics.mean(steps),
            "step_seconds_slowest": max(steps),
            "data_seconds_mean": statistics.mean(waits),
            "data_seconds_slowest": max(waits),
            "slowest_rank": waits.index(max(waits)),
        }


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of the CUDA device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
