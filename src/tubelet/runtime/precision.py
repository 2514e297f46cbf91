"""Floating-point type of forward passes."""

import logging
import platform
from typing import Literal

import torch

logger = logging.getLogger(__name__)

Precision = Literal["auto", "bfloat16", "float16", "float32"]
"""`auto` is bfloat16 where the device has instructions for it, float32 elsewhere."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for products of bfloat16 matrices, which torch otherwise emulates."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("aarch64", "arm64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type that `precision` stands for on `device`."""
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return getattr(torch, precision)


def name(dtype: torch.dtype) -> str:
    """Return the name of a type as options have it."""
    return str(dtype).removeprefix("torch.")


def warn_if_emulated(dtype: torch.dtype, device: torch.device, remedy: str) -> None:
    """Warn where bfloat16 is slower than float32; `remedy` is the option that avoids it."""
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        where = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        logger.warning("%s has no bfloat16 instructions; emulating them is several times slower: set %s", where, remedy)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of forward passes in `dtype`; it has no effect for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
