"""Data-parallel training: replicated (DDP) or sharded (FSDP2) models, and their state dicts."""

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tubelet.config import Config
from tubelet.runtime.distributed import World


class DistributedConfig(Config):
    """YAML key `distributed`: a section, or just `ddp` or `fsdp`. Not used by a single process."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process has the full model. fsdp: each has a shard of encoder, target encoder and predictor."""
    cpu_offload: bool = False
    """fsdp: keep parameters, gradients and optimizer state in host memory."""
    timeout: float = Field(600.0, gt=0)
    """Seconds without progress of a process after which the job is aborted, see `Watchdog`."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_cpu_offload(self) -> "DistributedConfig":
        if self.cpu_offload and self.kind != "fsdp":
            raise ValueError("cpu_offload requires kind: fsdp")
        return self


def parallelize(
    model: nn.Module, parts: Sequence[nn.Module], config: DistributedConfig, world: World, dtype: torch.dtype
) -> nn.Module:
    """Wrap or shard the model, so that gradients are averaged over all processes.

    Create the optimizer afterwards: FSDP replaces the parameters.

    Args:
        parts: Submodules that FSDP shards in place, with each element of their module lists (the blocks) as a unit.
        dtype: FSDP gathers parameters and computes in it; gradients are always reduced in float32.

    Returns:
        The module to call in the forward pass.
    """
    if world.world_size == 1:
        return model
    if config.kind == "ddp":
        # Non-persistent buffers are constants, equal in all processes: do not broadcast them in every step.
        constants = dict(model.named_buffers()).keys() - model.state_dict().keys()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.world_size,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
        ),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
        # Also in the root unit, so that all parameters are sharded outside of forward and backward passes.
        "reshard_after_forward": True,
    }
    for part in parts:
        for blocks in (child for child in part.children() if isinstance(child, nn.ModuleList)):
            for block in blocks:
                fully_shard(block, **options)
        fully_shard(part, **options)
    return model


def gradient_sync(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """Context for a backward pass that averages gradients over the processes only if `now`.

    The last backward pass of a step must average. FSDP averages in each one: unsharded gradients would need the memory
    that sharding saves.
    """
    if isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    return contextlib.nullcontext()


def is_sharded(model: nn.Module) -> bool:
    """Whether parts of the model are sharded by FSDP; then all processes must call their forward passes together."""
    return any(isinstance(module, FSDPModule) for module in model.children())


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor; gathers it from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of the tensor; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def model_state(module: nn.Module) -> dict[str, Any]:
    """State dict of a part of the model, with DTensors if it is sharded."""
    return get_model_state_dict(module)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Optimizer state by parameter names, independent of the number of processes."""
    return get_optimizer_state_dict(model, optimizer)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state by names of parameters, from full tensors or from local shards.

    Supervised training and frame prediction of version 0.1 stored numbers in place of names, in the order of the
    optimizer's parameters.
    """
    if any(isinstance(key, int) for key in state["state"]):
        optimizer.load_state_dict(state)
        return
    tensors = [value for values in state["state"].values() for value in values.values()]
    options = StateDictOptions(full_state_dict=not any(isinstance(tensor, DTensor) for tensor in tensors))
    set_optimizer_state_dict(model, optimizer, state, options=options)
    for group in optimizer.param_groups:
        group["betas"] = tuple(group["betas"])  # torch has made it a list
