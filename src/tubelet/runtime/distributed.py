"""The process's place among the processes of a run."""

import dataclasses
import datetime
import os
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tubelet.config import ConfigError

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

    def all_gather_object(self, own: Any) -> list[Any]:
        """What every process gives, by rank."""
        if self.world_size == 1:
            return [own]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, own)
        return everyone

    def broadcast_from_rank0(self, look: Callable[[], Any]) -> Any:
        """What `look()` returns in the main process; an exception of it is raised in all."""
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = look()
            except Exception as error:
                found[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def max(self, number: int) -> int:
        """The largest `number` of all processes."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


def init(rank: int, world_size: int, device: str, address: str) -> World:
    """Make this process a member of the group at `address` (tcp://host:port).

    A group that cannot be formed is an error on every rank: nobody trains alone.
    """
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            init_method=address,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
        )
    return World(rank, world_size, place)


def init_from_environment(on_cpu: bool) -> World | None:
    """The place that torchrun or srun gave this process; None where neither has started it.

    torchrun says RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun says SLURM_PROCID,
    SLURM_STEP_NUM_TASKS and SLURM_LOCALID, and the processes meet at the job's first node, at a port that its number
    gives (MASTER_ADDR and MASTER_PORT win). Raises ConfigError where there is no GPU.
    """
    if _by_torchrun():
        rank, size, local_rank, address = "RANK", "WORLD_SIZE", "LOCAL_RANK", "env://"
    elif "SLURM_STEP_NUM_TASKS" in os.environ:
        rank, size, local_rank, address = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", _slurm_address()
    else:
        return None
    rank, size, local_rank = (int(os.environ[name]) for name in (rank, size, local_rank))
    return init(rank, size, "cpu" if on_cpu else _own_gpu(local_rank), address)


def size_from_environment() -> int:
    """Processes that torchrun or srun has started, this one among them; 1 where neither has started it."""
    return int(os.environ["WORLD_SIZE"] if _by_torchrun() else os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def _by_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def _own_gpu(local_rank: int) -> str:
    """A task that sees one GPU only, as with --gpus-per-task, has it at number 0."""
    if not torch.cuda.is_available():
        host = socket.gethostname()
        raise ConfigError(f"torch finds no GPU on {host}; to do without: --devices cpu, in SLURM jobs slurm.device=cpu")
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def _slurm_address() -> str:
    nodes = os.environ["SLURM_JOB_NODELIST"]
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    host = os.environ.get("MASTER_ADDR", listed.stdout.split()[0])
    port = os.environ.get("MASTER_PORT", 20_000 + (job * 7 + step) % 12_000)  # below the ports of outgoing connections
    return f"tcp://{host}:{port}"


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_address() -> str:
    """An address on this machine that a new process group can meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
