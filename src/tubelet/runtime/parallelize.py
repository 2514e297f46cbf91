"""Compiled blocks, replicated (DDP) or sharded (FSDP2) models, and their state dicts."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tubelet.config import Config, ConfigError
from tubelet.runtime.distributed import World


class DistributedConfig(Config):
    """YAML key `distributed`: a section, or just `ddp` or `fsdp`. Not used by a single process."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process has the full model. fsdp: each has a shard of encoder, target encoder and predictor."""
    cpu_offload: bool = False
    """fsdp: keep parameters, gradients and optimizer state in host memory."""
    reshard_after_forward: bool = False
    """fsdp: free the gathered parameters of trained parts between the forward and the backward pass, and gather them
    again. Saves as much memory as these parameters need in `meta.dtype`, for half as many collectives again."""
    shard_size: int | None = Field(None, ge=2)
    """fsdp: number of consecutive processes that hold a copy of the model together, such as the GPUs of a node, so that
    parameters are gathered within it only (HSDP); null: all processes."""
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
        if self.shard_size and self.kind != "fsdp":
            raise ValueError("shard_size requires kind: fsdp")
        return self


def blocks_of(part: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the lists of transformer blocks of a part: its module lists whose elements are more than single layers."""
    for child in part.children():
        if isinstance(child, nn.ModuleList) and all(any(True for _ in block.children()) for block in child):
            yield list(child)


def compile_blocks(part: nn.Module, backend: str = "inductor") -> None:
    """Compile the transformer blocks of a part in place; names of parameters do not change.

    Blocks of the same structure share a graph, which takes as long to compile as one block, and it serves any number of
    tokens. The few layers outside of blocks stay as they are.
    """
    # A graph of a single block need not be cut at DDP's buckets, as that of a whole model.
    torch._dynamo.config.optimize_ddp = False
    for blocks in blocks_of(part):
        for block in blocks:
            block.compile(dynamic=True, backend=backend)


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
    for part in parts:
        _shard(part, config, world, dtype)
    return model


def _shard(part: nn.Module, config: DistributedConfig, world: World, dtype: torch.dtype) -> None:
    """Shard a part of the model, with each of its blocks as a unit."""
    is_trained = any(parameter.requires_grad for parameter in part.parameters())
    options: dict[str, Any] = {
        "mesh": _mesh(config, world),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
        ),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
        # What has no backward pass would stay gathered.
        "reshard_after_forward": config.reshard_after_forward or not is_trained,
    }
    for blocks in blocks_of(part):
        units = [fully_shard(block, **options) for block in blocks]
        # The host starts the gathering of the next block before the current one, not after it.
        for unit, following in itertools.pairwise(units):
            unit.set_modules_to_forward_prefetch([following])
    fully_shard(part, **options)
    part.register_forward_hook(_reshard_without_gradients)


def _mesh(config: DistributedConfig, world: World) -> DeviceMesh:
    """Return the mesh of all processes, with two dimensions if several groups hold a copy of the model each."""
    size = config.shard_size or world.world_size
    if world.world_size % size:
        raise ConfigError(
            f"distributed.shard_size: {size} does not divide the {world.world_size} processes; take a divisor, or null"
        )
    if size == world.world_size:
        return init_device_mesh(world.device.type, (size,))
    return init_device_mesh(world.device.type, (world.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def _reshard_without_gradients(part: nn.Module, inputs: Any, output: Any) -> None:
    """Shard a part again after a forward pass that no backward pass follows, so that its parameters are shards."""
    if not torch.is_grad_enabled():
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


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
