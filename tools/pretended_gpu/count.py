"""Counts of a training step; started by `python -m tools.pretended_gpu` in a process with the pretended runtime."""

import argparse
import collections
import ctypes
import json
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as ddp
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import noise
from tools.pretended_gpu.build import LIBRARY, build
from tubelet.data import Batch
from tubelet.runtime.distributed import World
from tubelet.training.trainer import Trainer

GIB = 2**30
ROOT = Path(__file__).parents[2]
# Of them "kernel" and "matrix product" are launches.
COPIES = ("copy on the device", "copy to the device", "copy to the host")
COUNTED = ("kernel", "matrix product", "cudaMemsetAsync", *COPIES)
ALLOCATOR = ("cudaMalloc", "cudaFree", "cuMemCreate", "cuMemRelease")


class Runtime:
    """The counters of the pretended runtime, which is loaded into this process."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(build() / LIBRARY))
        self.library.pretended_gpu_count.restype = ctypes.c_long
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self._listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._on_wait)  # kept alive

    def count(self, name: str) -> int:
        return self.library.pretended_gpu_count(name.encode())

    def reset(self) -> None:
        """Start counting, waits included."""
        self.library.pretended_gpu_reset()
        self.library.pretended_gpu_on_wait(self._listener)

    def stop(self) -> None:
        self.library.pretended_gpu_on_wait(None)

    def kernels(self) -> dict[str, int]:
        """Return the number of launches of each kernel by its name in C++."""
        found: dict[str, int] = {}

        @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)
        def each(name: bytes, launches: int) -> None:
            found[name.decode()] = launches

        self.library.pretended_gpu_kernels(each)
        if shutil.which("c++filt") is None:
            return found
        names = subprocess.run(["c++filt"], input="\n".join(found), env={}, text=True, capture_output=True).stdout
        return dict(zip(names.split("\n"), found.values(), strict=False))

    def _on_wait(self, what: bytes) -> None:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        frame = next((frame for frame in reversed(frames) if frame.filename != __file__), None)
        where = "?" if frame is None else f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        self.waits[what.decode(), where] += 1


class StandInConvolution(torch.autograd.Function):
    """A convolution without overlap as one kernel; cuDNN's cannot be pretended, and torch's own are many kernels."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(x, weight)
        context.has_bias = bias is not None
        sizes = [n // k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
        return x.new_zeros(x.shape[0], weight.shape[0], *sizes)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = context.saved_tensors
        bias = grad.sum([0, *range(2, grad.ndim)]) if context.has_bias else None
        return (torch.zeros_like(x) if context.needs_input_grad[0] else None), torch.zeros_like(weight), bias


def _conv_forward(self: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if self.stride != self.kernel_size:
        raise NotImplementedError("the pretended GPU has no convolutions with overlap")
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        x, weight = x.to(dtype), weight.to(dtype)
    return StandInConvolution.apply(x, weight, bias)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fname", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    nn.Conv3d._conv_forward = _conv_forward  # type: ignore[method-assign]
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    world = World(0, arguments.world_size, device)
    if world.world_size > 1:
        _pretend_processes(world.world_size)
    with tempfile.TemporaryDirectory() as folder:
        options = noise.read_options(arguments.fname, arguments.overrides, folder)
        with device:  # draws initial weights with kernels that do nothing
            trainer = noise.make_trainer(options, world)
        batches = list(noise.batches(options, world, arguments.steps + 1))
        arguments.out.write_text(json.dumps(count(trainer, batches, Runtime())))


def _pretend_processes(world_size: int) -> None:
    """Join a process group whose collectives do nothing. What waits for an answer of the others is left out."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    dist.new_group = lambda *args, **kwargs: dist.group.WORLD  # of gloo, for checkpoints
    ddp._verify_param_shape_across_processes = lambda *args, **kwargs: True
    ddp._sync_module_states = lambda *args, **kwargs: None


def count(trainer: Trainer, batches: list[Batch], runtime: Runtime) -> dict[str, Any]:
    """Take a step with each batch; count all but the first, which allocates the state of the optimizer."""
    first, *rest = batches
    trainer.train_step(first)
    at_rest = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runtime.reset()
    seconds = [_processor_seconds(lambda batch=batch: trainer.train_step(batch)) for batch in rest]  # type: ignore[misc]
    runtime.stop()
    steps = len(rest)
    per_step = {name: runtime.count(name) / steps for name in (*COUNTED, *ALLOCATOR)}
    launches = per_step["kernel"] + per_step["matrix product"]
    host = min(seconds) * 1e3
    kernels = sorted(runtime.kernels().items(), key=lambda item: -item[1])
    memory = torch.cuda.memory_stats()
    return {
        "per_step": {"launches": launches, **per_step, "host, ms of processor time": round(host, 1)},
        "memory": {
            "allocated at rest": at_rest / GIB,
            "peak allocated": torch.cuda.max_memory_allocated() / GIB,
            "peak reserved": torch.cuda.max_memory_reserved() / GIB,
        },
        "allocation_retries": memory["num_alloc_retries"],
        "waits": [{"what": what, "where": where, "times": n} for (what, where), n in runtime.waits.most_common()],
        "collectives": _collectives(trainer, first) if trainer.world.world_size > 1 else {},
        "kernels": [{"name": name, "per_step": number / steps} for name, number in kernels],
    }


def _collectives(trainer: Trainer, batch: Batch) -> dict[str, int]:
    with CommDebugMode() as mode:
        trainer.train_step(batch)
    return {str(name).rpartition(".")[2]: number for name, number in mode.get_comm_counts().items()}


def _processor_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
