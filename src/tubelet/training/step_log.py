"""One line a step, while the device is read once for many steps."""

import resource
import socket
import statistics
import time

import torch
from torch import Tensor

from tubelet.runtime.distributed import World


class StepLog:
    """Keeps the steps' scalars on the device until `flush` reads them all at once."""

    def __init__(self, world: World):
        self.world = world
        self.hosts: list[str] = world.all_gather_object(socket.gethostname())
        self._numbers: list[dict[str, float]] = []
        self._tensors: list[dict[str, Tensor]] = []
        self._before: list[dict[str, float]] = []
        self._since = time.perf_counter()

    def add(self, numbers: dict[str, float], tensors: dict[str, Tensor]) -> None:
        """Note a step: `numbers` that the host knows, and scalar `tensors` that may still be being computed."""
        self._numbers.append(numbers)
        self._tensors.append(tensors)

    def amend(self, numbers: dict[str, float]) -> None:
        """Add `numbers` to the line of the last noted step, or make a line of them before the first step."""
        if self._numbers:
            self._numbers[-1] |= numbers
        else:
            self._before.append(numbers)

    def flush(self, clips_per_step: int) -> list[dict[str, float]]:
        """The noted steps' lines: the tensors' means over all processes, the speed since the last flush, and memory.

        Of several processes also the mean and the longest time of a step and of waiting for data, and which waited it.
        Waits for the device; every process has to call it.
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
            speed |= self._slowest(seconds)
        lines = self._before + [
            {**numbers, **dict(zip(names, row, strict=True)), **speed}
            for numbers, row in zip(self._numbers, rows, strict=True)
        ]
        self._before, self._numbers, self._tensors, self._since = [], [], [], time.perf_counter()
        return lines

    def _slowest(self, step_seconds: float) -> dict[str, float]:
        waiting = statistics.mean(numbers["data_seconds"] for numbers in self._numbers)
        steps, waits = zip(*self.world.all_gather_object((step_seconds, waiting)), strict=True)
        return {
            "step_seconds_mean": statistics.mean(steps),
            "step_seconds_slowest": max(steps),
            "data_seconds_mean": statistics.mean(waits),
            "data_seconds_slowest": max(waits),
            "slowest_rank": waits.index(max(waits)),
        }


def peak_memory_gb(device: torch.device) -> float:
    """Most memory in use so far, in GiB: on the device, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
