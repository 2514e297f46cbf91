"""Attention: the time that a backend takes for a new sequence length, and the patterns of FastBack."""

import math
import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.session import Session
from tubelet.grid import Grid
from tubelet.layers.attention import AttentionFn
from tubelet.layers.pattern_attention import attend_frame_by_frame, boolean_mask
from tubelet.models.fastback import BidirectionalTemporalAttention

BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LENGTHS = 8


def new_lengths(session: Session) -> None:
    """Forward and backward pass of attention with a length that the process has not seen yet, and again with it."""
    batch, heads, head_dim = (1, 2, 16) if session.tiny else (24, 16, 64)
    for number, (name, backend) in enumerate(BACKENDS.items()):
        measure = partial(_measure_lengths, session, backend, (batch, heads), head_dim, number)
        session.attempt(f"attention of {batch} x {heads} heads of {head_dim}, {name}", measure, 3)


def _measure_lengths(
    session: Session, backend: SDPBackend | None, batch: tuple[int, int], head_dim: int, offset: int
) -> dict[str, Any]:
    """`offset` gives each backend lengths of its own: the default may be one of the others, which keep their plans."""
    first, later = [], []
    start = offset + (24 if session.tiny else 600)
    for length in range(start, start + 2 * 7 * LENGTHS, 14):  # no multiples of 8: the least convenient lengths
        step = partial(_attention_step, backend, _inputs(session, (*batch, length, head_dim)))
        try:
            first.append(session.milliseconds(step))
        except RuntimeError as error:
            if not re.search("No (available kernel|viable backend)", str(error)):
                raise
            return {"note": "not available for these tensors"}
        later.append(session.milliseconds(step))
    skipped = first[1:]  # the very first call loads the library
    return {
        "milliseconds": statistics.median(later),
        "first_milliseconds": statistics.median(skipped),
        "note": f"first call of {LENGTHS - 1} new lengths: median shown, maximum {max(skipped):.1f} ms",
        "details": {"first_ms": first, "later_ms": later},
    }


def _attention_step(backend: SDPBackend | None, inputs: list[Tensor]) -> None:
    if backend is None:
        F.scaled_dot_product_attention(*inputs).sum().backward()
        return
    with sdpa_kernel([backend]):
        F.scaled_dot_product_attention(*inputs).sum().backward()


def _inputs(session: Session, shape: tuple[int, ...]) -> list[Tensor]:
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    return [torch.randn(shape, device=session.device, dtype=dtype, requires_grad=True) for _ in range(3)]


def fastback(session: Session) -> None:
    """FastBack's attention layer with each implementation of its pattern, forward and backward pass."""
    grid, width, heads, batch = (Grid(4, 4, 4), 32, 2, 2) if session.tiny else (Grid(16, 14, 14), 768, 12, 8)
    with session.device:
        layer = BidirectionalTemporalAttention(width, heads, heads // 2, heads // 2, frame_size=grid.h * grid.w)
        x = torch.randn(batch, math.prod(grid), width)
    frame_sizes = [grid.h * grid.w] * grid.t
    choices: dict[str, Callable[[], AttentionFn]] = {
        "no pattern": lambda: F.scaled_dot_product_attention,
        "as chosen (FlexAttention on a GPU)": lambda: layer.attention_fn(None, grid, x.device),
        "frame by frame": lambda: partial(attend_frame_by_frame, heads=layer.heads, frame_sizes=frame_sizes),
        "boolean mask": lambda: partial(
            F.scaled_dot_product_attention, attn_mask=boolean_mask(layer.heads, grid, device=x.device)
        ),
    }
    for name, choose in choices.items():
        session.attempt(
            f"FastBack, {batch} x {math.prod(grid)} tokens, {name}", partial(_layer, session, layer, x, choose)
        )


def _layer(
    session: Session, layer: BidirectionalTemporalAttention, x: Tensor, choose: Callable[[], AttentionFn]
) -> dict[str, Any]:
    attend = choose()

    def step() -> None:
        with torch.autocast(session.device.type, torch.bfloat16, enabled=session.device.type == "cuda"):
            layer(x, attend=attend).float().square().mean().backward()

    first = session.milliseconds(step)
    median = session.median_milliseconds(step, calls=2 if session.tiny else 20)
    return {"milliseconds": median, "first_milliseconds": first, **session.memory()}
