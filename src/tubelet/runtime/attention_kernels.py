"""Which of its attention kernels torch runs on CUDA."""

import contextlib
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionKernel = Literal["flash", "efficient", "cudnn", "math", "auto"]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_kernels(first: AttentionKernel, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return the context of training steps in which `scaled_dot_product_attention` prefers one kernel.

    Where it cannot run, for example flash attention with a mask, the next one is taken, in the order flash, efficient,
    math. On H100 and later GPUs torch takes cuDNN where that is allowed, even if it is not the first of the list, so
    it is allowed only where it is asked for. It makes a plan for each new shape, which takes up to a second, and masks
    give the sequences of a pretraining many lengths; flash attention needs no plans.

    The context covers all of torch's attention, in whichever layer, and the backward pass, too, where checkpointed
    blocks run attention again. It is entered outside of compiled modules, so that it breaks no graph; the kernels of a
    compiled graph are those preferred when it is compiled.

    Args:
        first: The preferred kernel; "auto" leaves the choice to torch.
        device: Device of the training; the context has no effect unless it is a CUDA device.
    """
    if first == "auto" or device.type != "cuda":
        return contextlib.nullcontext()
    order = [_BACKENDS[first], *(backend for name, backend in _BACKENDS.items() if name not in (first, "cudnn"))]
    return sdpa_kernel(order, set_priority=True)
