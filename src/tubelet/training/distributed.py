"""The process's place among the processes of a run."""

import dataclasses
import datetime
import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(minutes=10)


@dataclasses.dataclass(frozen=True)
class World:
    """Rank, number of processes and device of this process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over all processes, in place."""
        return self.sum(tensor).div_(self.world_size)

    def max(self, number: int) -> int:
        """The largest `number` of all processes."""
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


def join(rank: int, world_size: int, device: str, address: str) -> World:
    """Make this process a member of the group at `address` (tcp://host:port).

    A group that cannot be formed is an error on every rank: nobody trains alone.
    """
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            init_method=address,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
    return World(rank, world_size, place)


def join_from_environment() -> World:
    """The place that torchrun gave this process (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""
    local_rank = os.environ["LOCAL_RANK"]
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    return join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device, "env://")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_address() -> str:
    """An address on this machine that a new process group can meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
