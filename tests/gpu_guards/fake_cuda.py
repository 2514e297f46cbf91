"""A CUDA device whose tensors have a shape and no values, to find on a CPU where the host would wait for a GPU.

Tensors on the CPU stay real, so the program's logic on the host runs as it is; every tensor on `cuda` is a FakeTensor,
and an operation that mixes the two is an error, as it is on a GPU. Backward passes are left out, as autograd starts a
thread for the device, which is not there; the parameters in the graph of the loss get gradients of their shape.

Call it in a process of its own: afterwards autograd cannot be used in forks.
"""

import collections
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

REPOSITORY = Path(__file__).parents[2]
OWN_FILES = ("app", "evals", "src")

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
"""Operations that return a number, or a tensor whose size depends on values."""

STAGED_BYTES = 2**16
"""CUDA copies so much memory that is not pinned to a buffer of its own, without waiting for the device."""


class FakeCuda(TorchDispatchMode):
    """Counts the places where the host waits for the device.

    Attributes:
        waits: (what, file:line of the program) -> number of times.
        operations: Number of operations on the device.
    """

    def __init__(self):
        super().__init__()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.operations = 0
        self.pinned: list[torch.UntypedStorage] = []

    def clear(self):
        self.waits.clear()
        self.operations = 0

    def pin(self, tensor):
        """`tensor.pin_memory()`: remembers the memory, as pinned memory needs a driver."""
        self.pinned.append(tensor.untyped_storage())
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        on_device = any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda" for leaf in leaves)
        if not on_device and not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self.operations += 1
        if "generator" in kwargs:
            kwargs["generator"] = None
        if on_device and func in READS:
            self._wait(f"{func} reads the device")
            if func is aten._local_scalar_dense.default:
                return 0.0 if args[0].is_floating_point() else 0
            if func is aten.equal.default:
                return True
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            for index in args[1]:
                if index is not None and index.dtype == torch.bool and not _is_masked_fill(func, args):
                    self._wait("an index that is a mask: its elements are counted on the device")
                elif index is not None and index.device.type == "cpu" and index.ndim:
                    self._wait("an index on the host is copied")
        if func in (aten._to_copy.default, aten.copy_.default):
            self._check_copy(func, args, kwargs)
        return func(*args, **kwargs)

    def _check_copy(self, func, args, kwargs):
        if func is aten.copy_.default:
            target, source = args[0].device, args[1]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        else:
            target, source = torch.device(kwargs.get("device") or args[0].device), args[0]
            non_blocking = kwargs.get("non_blocking")
        if source.device.type == "cuda" and target.type == "cpu":
            self._wait("copy to the host")
        elif source.device.type == "cpu" and target.type == "cuda":
            if not non_blocking:
                self._wait("blocking copy to the device")
            elif source.nbytes > STAGED_BYTES and not self._is_pinned(source):
                self._wait("copy of memory to the device that is not pinned")

    def _is_pinned(self, tensor):
        return any(tensor.untyped_storage().data_ptr() == memory.data_ptr() for memory in self.pinned)

    def _wait(self, what):
        own = []
        for frame in traceback.extract_stack():
            path = Path(frame.filename)
            if path.is_relative_to(REPOSITORY) and path.relative_to(REPOSITORY).parts[0] in OWN_FILES:
                own.append(f"{path.relative_to(REPOSITORY)}:{frame.lineno}")
        self.waits[what, own[-1] if own else "?"] += 1


def _is_masked_fill(func, args):
    """Whether `tensor[mask] = number`, which torch computes as `masked_fill`."""
    return func is not aten.index.Tensor and args[2].ndim == 0


def _to(module, device=None, *args, **kwargs):
    """`module.to("cuda")`, which torch cannot do in place with FakeTensors."""
    if device is None or torch.device(device).type != "cuda":
        return module
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to("cuda", non_blocking=True)
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to("cuda", non_blocking=True)
    return module


def _backward(loss, *args, **kwargs):
    """`loss.backward()`: gradients of the right shape for all parameters that the loss depends on."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)
        nodes += [following for following, _ in node.next_functions]


_make_generator = torch.Generator


class _GeneratorOnHost:
    """`torch.Generator(device)`, a class as annotations name it."""

    def __new__(cls, device="cpu"):
        return _make_generator()


_start_loader = _SingleProcessDataLoaderIter.__init__


def _pin_without_accelerator(iterator, loader):
    """`DataLoader.__iter__` without workers, which pins nothing where torch finds no accelerator."""
    _start_loader(iterator, loader)
    iterator._pin_memory = loader.pin_memory


@contextlib.contextmanager
def fake_cuda():
    """Context in which `cuda` is such a device; yields the `FakeCuda`."""
    device = FakeCuda()
    replaced = {
        (torch.cuda.amp.common, "amp_definitely_not_available"): lambda: False,
        (torch.cuda, "is_bf16_supported"): lambda *args, **kwargs: True,
        (_SingleProcessDataLoaderIter, "__init__"): _pin_without_accelerator,
        (torch, "Generator"): _GeneratorOnHost,
        (nn.Module, "to"): _to,
        (torch.Tensor, "backward"): _backward,
        (torch.Tensor, "pin_memory"): lambda tensor, *args: device.pin(tensor),
    }
    with contextlib.ExitStack() as stack:
        for (target, name), value in replaced.items():
            stack.enter_context(mock.patch.object(target, name, value))
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(device)
        yield device
