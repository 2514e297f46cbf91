"""The process group of a run, and the rank of this process in it."""

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

from tubelet.config import ConfigError, UserError
from tubelet.runtime.devices import expand_segments

TIMEOUT = datetime.timedelta(minutes=10)


@dataclasses.dataclass(frozen=True)
class World:
    """Rank of this process, number of processes, and device of this process.

    The collectives work also for a single process, which has no process group.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` to the sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` to the mean over all processes, in place."""
        return self.sum(tensor).div_(self.world_size)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_from_rank0(self, function: Callable[[], Any]) -> Any:
        """Call `function` in rank 0 and return its result in all processes; an exception is raised in all."""
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = function()
            except Exception as error:
                result[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            if isinstance(result[1], UserError):
                result[1].printed_elsewhere = not self.is_main
            raise result[1]
        return result[0]

    def max(self, number: int) -> int:
        """The maximum of `number` over all processes."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


ONE_PROCESS = World()


def init(rank: int, world_size: int, device: str, address: str) -> World:
    """Join the process group at `address`, e.g. tcp://host:port. Raises in every rank if the group is incomplete."""
    torch_device = torch.device(device)
    on_gpu = torch_device.type == "cuda"
    if on_gpu:
        expand_segments()
        torch_device = torch.device("cuda", torch_device.index or 0)
        torch.cuda.set_device(torch_device)
    if world_size > 1:
        # As `init_process_group` does with an address; NCCL would hang where two processes share a GPU.
        store, rank, world_size = next(dist.rendezvous(address, rank, world_size, timeout=TIMEOUT))
        store.set_timeout(TIMEOUT)
        if on_gpu:
            check_one_gpu_each(dist.PrefixStore("gpus", store), rank, world_size, _gpu_name(torch_device))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=torch_device if on_gpu else None,
        )
    return World(rank, world_size, torch_device)


def _gpu_name(device: torch.device) -> str:
    """Name of a GPU that is the same in all processes, and unique."""
    return f"{torch.cuda.get_device_properties(device).uuid} of {socket.gethostname()}"


def check_one_gpu_each(store: dist.Store, rank: int, world_size: int, gpu: str) -> None:
    """Raise ConfigError, in all processes, where two of them have the same GPU.

    Args:
        store: Shared by the processes, for this check alone.
        rank: Rank of this process.
        world_size: Number of processes.
        gpu: Unique name of the GPU of this process.
    """
    store.set(str(rank), gpu)
    gpus = [name.decode() for name in store.multi_get([str(other) for other in range(world_size)])]
    store.set(f"{rank} has read", "")
    if rank == 0:  # which may hold the store, and must not end before the others have read it
        store.wait([f"{other} has read" for other in range(world_size)])
    for other, name in enumerate(gpus):
        if (first := gpus.index(name)) != other:
            raise ConfigError(
                f"the processes {first} and {other} share the GPU {name}; start one process for each GPU (--devices "
                "cuda:0 cuda:1 …, torchrun --nproc-per-node, slurm.tasks_per_node)"
            )


def init_from_environment(on_cpu: bool) -> World | None:
    """Join the process group that torchrun or srun describes in the environment.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun sets SLURM_PROCID,
    SLURM_STEP_NUM_TASKS and SLURM_LOCALID; the address is then MASTER_ADDR, by default the first node of the job, and
    MASTER_PORT, by default a port that depends on the job id.

    Returns:
        None if neither torchrun nor srun has started this process.

    Raises:
        ConfigError: There is no GPU, and `on_cpu` is false.
    """
    if _started_by_torchrun():
        names, address = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "env://"
    elif "SLURM_STEP_NUM_TASKS" in os.environ:
        names, address = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), _slurm_address()
    else:
        return None
    rank, size, local_rank = (int(os.environ[name]) for name in names)
    return init(rank, size, "cpu" if on_cpu else _gpu(local_rank), address)


def world_size_from_environment() -> int:
    """Number of processes that torchrun or srun has started; 1 if neither has started this one."""
    return int(os.environ["WORLD_SIZE"] if _started_by_torchrun() else os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def _started_by_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def _gpu(local_rank: int) -> str:
    """The GPU of a local rank. A task that sees only one, as with --gpus-per-task, has it as cuda:0."""
    if not torch.cuda.is_available():
        host = socket.gethostname()
        raise ConfigError(f"no GPU on {host}; to run on the CPU: --devices cpu, in SLURM jobs slurm.device=cpu")
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def _slurm_address() -> str:
    nodes = os.environ["SLURM_JOB_NODELIST"]
    hostnames = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    host = os.environ.get("MASTER_ADDR", hostnames.stdout.split()[0])
    port = os.environ.get("MASTER_PORT", 20_000 + (job * 7 + step) % 12_000)  # below the ports of outgoing connections
    return f"tcp://{host}:{port}"


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_address() -> str:
    """An unused local address for a new process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
