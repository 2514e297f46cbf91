"""Attention under patterns on a GPU, with FlexAttention where it is chosen, and dense masked attention on the CPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from tubelet.grid import Grid
from tubelet.layers.block_attention import attend_by_blocks
from tubelet.layers.pattern_attention import boolean_mask, pattern_attention
from tubelet.layers.patterns import Lookahead, Lookback, parse_pattern

pytestmark = pytest.mark.gpu
GRID = Grid(4, 6, 6)
PATTERNS = {
    "fastback": (Lookback(), Lookback(), Lookahead(), Lookahead()),
    "sparse": (parse_pattern("TemporalStride(2) & SpatialStride(2) | SpatialWindow(0)"),),
    "temporal window": (parse_pattern("TemporalWindow(1)"),),
    "window": (parse_pattern("Window((2, 3, 3))"),),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "kept tokens"])
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name, masked, device):
    heads = PATTERNS[name]
    torch.manual_seed(0)
    n = math.prod(GRID)
    keep = torch.stack([torch.randperm(n)[:64].sort().values for _ in range(2)]) if masked else None
    shape = (2, 4, 64 if masked else n, 32)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    on_device = [x.detach().to(device).requires_grad_() for x in inputs]
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=boolean_mask(heads, GRID, keep))
    attend = pattern_attention(heads, GRID, None if keep is None else keep.to(device), device, head_dim=32)
    measured = attend(*on_device)
    if device.type == "cuda" and not masked and name != "window":
        assert attend.func is attend_by_blocks
    torch.testing.assert_close(measured.cpu(), expected, rtol=1e-2, atol=2e-3)
    weights = torch.randn(shape)
    (expected * weights).sum().backward()
    (measured * weights.to(device)).sum().backward()
    for x, y in zip(on_device, inputs, strict=True):
        torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=2e-2, atol=5e-3)
