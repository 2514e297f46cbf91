"""How a model is spread over the processes of a run: replicated (DDP) or sharded (FSDP2)."""

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
    """YAML key `distributed`: the word `ddp` or `fsdp`, or a section. One process needs neither."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the whole model. fsdp: each holds its share of encoder, target encoder and predictor."""
    cpu_offload: bool = False
    """fsdp: shares, gradients and optimiser state stay in host memory."""
    timeout: float = Field(600.0, gt=0)
    """Seconds without progress of a process after which the whole job ends and says which process it was."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_word(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> "DistributedConfig":
        if self.cpu_offload and self.kind != "fsdp":
            raise ValueError("cpu_offload goes with kind: fsdp only")
        return self


def parallelize(
    model: nn.Module, parts: Sequence[nn.Module], config: DistributedConfig, world: World, dtype: torch.dtype
) -> nn.Module:
    """`model`, ready to be called by every process, so that gradients are the mean over all of them.

    With FSDP the `parts` are sharded in place, each element of their module lists (the blocks) as a unit of its own;
    an optimiser must be made afterwards, from their new parameters. `dtype`: what sharded parameters are gathered and
    computed in; gradients are always summed in fp32.
    """
    if world.world_size == 1:
        return model
    if config.kind == "ddp":
        # Buffers that are no part of the state are tables, the same in all processes: they are not sent at every step.
        tables = dict(model.named_buffers()).keys() - model.state_dict().keys()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.world_size,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
        ),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
        # Also of the outermost unit, so that outside of forward and backward all parameters are shards.
        "reshard_after_forward": True,
    }
    for part in parts:
        for blocks in (child for child in part.children() if isinstance(child, nn.ModuleList)):
            for block in blocks:
                fully_shard(block, **options)
        fully_shard(part, **options)
    return model


def gradient_sync(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """Whether a backward pass in here averages gradients over the processes; the last one of a step has to.

    Sharded gradients are averaged each time: to keep them whole until the last would take the memory that shards save.
    """
    wait = isinstance(model, DistributedDataParallel) and not now
    return model.no_sync() if wait else contextlib.nullcontext()


def is_sharded(model: nn.Module) -> bool:
    """Whether forward passes of the model's parts are joint work of all processes."""
    return any(isinstance(module, FSDPModule) for module in model.children())


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def model_state(module: nn.Module) -> dict[str, Any]:
    """State dict of a part of the model; its tensors are DTensors where it is sharded."""
    return get_model_state_dict(module)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of the optimiser by names of parameters, the same for one process and for many."""
    return get_optimizer_state_dict(model, optimizer)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """From whole tensors or from shards like the optimiser's own."""
    tensors = [value for of_one in state["state"].values() for value in of_one.values()]
    options = StateDictOptions(full_state_dict=not any(isinstance(tensor, DTensor) for tensor in tensors))
    set_optimizer_state_dict(model, optimizer, state, options=options)
