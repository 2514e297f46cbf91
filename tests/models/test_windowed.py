import functools

import pytest
import torch
from torch import nn
from torchvision.models.video.swin_transformer import shifted_window_attention_3d

from tubelet.layers.pattern_attention import _attend_in_windows
from tubelet.layers.patterns import Window
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.models.windowed import WindowedTransformer

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "init_std": 0.1}


def windowed(frames=8, size=(32, 40), window_size=(2, 3, 3), **arguments):
    torch.manual_seed(0)
    model = WindowedTransformer(img_size=size, num_frames=frames, window_size=window_size, **SMALL, **arguments)
    return model.eval()


def clips(frames=8, height=32, width=40):
    return torch.randn(2, 3, frames, height, width, generator=torch.Generator().manual_seed(1))


def groups(extent, size, shifted):
    """Window number of each index along an axis, by counting. Swin shifts by half unless one window covers the axis."""
    size = min(size, extent)
    until_border = size // 2 if shifted and size < extent and size > 1 else size
    window, numbers = 0, []
    for _ in range(extent):
        numbers.append(window)
        until_border -= 1
        if until_border == 0:
            window, until_border = window + 1, size
    return torch.tensor(numbers)


def same_window(grid, window_size, shifted):
    """Return [N, N], True for pairs of the same window."""
    axes = [groups(extent, size, shifted) for extent, size in zip(grid, window_size, strict=True)]
    t, y, x = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    return (t[:, None] == t) & (y[:, None] == y) & (x[:, None] == x)


def dense(model, x, grid, window_size, shifted, keep=None):
    """Dense attention of all tokens with the windows as a mask; only kept tokens are keys."""
    y = model.positions.add(model.patch_embed(x), None, grid)
    kept = torch.ones(y.shape[:2]) if keep is None else torch.zeros(y.shape[:2]).scatter(1, keep, 1.0)
    for layer, block in enumerate(model.blocks):
        mask = same_window(grid, window_size, shifted and layer % 2 == 1)
        q, k, v = block.attn.qkv(block.norm1(y)).unflatten(2, (3, 2, 24)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * 24**-0.5).exp() * mask * kept[:, None, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        y = y + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        y = y + block.mlp(block.norm2(y))
    y = model.norm(y)
    return y if keep is None else y.gather(1, keep[..., None].expand(-1, -1, y.shape[-1]))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("frames", "height", "width", "window_size"),
    [
        (8, 32, 32, (2, 2, 2)),  # windows divide the grid
        (8, 32, 40, (2, 3, 3)),
        (10, 40, 56, (2, 4, 3)),
        (6, 16, 40, (2, 7, 2)),  # one window covers the rows
        (2, 24, 16, (2, 1, 2)),
    ],
)
def test_windows_equal_dense_attention_with_a_mask(frames, height, width, window_size, shifted, masked):
    model = windowed(frames, (height, width), window_size, shifted=shifted)
    x, grid = clips(frames, height, width), (frames // 2, height // 8, width // 8)
    n = grid[0] * grid[1] * grid[2]
    keep = torch.stack([torch.randperm(n)[: n // 2] for _ in range(2)]) if masked else None
    expected = dense(model, x, grid, window_size, shifted, keep)
    torch.testing.assert_close(model(x, keep), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 1)])
def test_window_attention_equals_torchvision(shift):
    """The cyclic shift and mask of Video Swin separate the same groups (without relative positions)."""
    torch.manual_seed(0)
    grid, size, heads = (4, 8, 6), [2, 4, 2], 3
    x = torch.randn(2, *grid, 24)
    qkv, proj = nn.Linear(24, 72), nn.Linear(24, 24)
    n = size[0] * size[1] * size[2]
    expected = shifted_window_attention_3d(
        x, qkv.weight, proj.weight, torch.zeros(1, heads, n, n), size, heads, list(shift), 0.0, 0.0, qkv.bias, proj.bias
    )
    q, k, v = qkv(x.flatten(1, 3)).unflatten(2, (3, heads, 8)).permute(2, 0, 3, 1, 4)
    result = _attend_in_windows(q, k, v, Window(tuple(size), shift), grid)
    torch.testing.assert_close(proj(result.transpose(1, 2).flatten(2)), expected.flatten(1, 3), atol=1e-5, rtol=0)


def test_a_window_that_covers_the_grid_equals_a_vision_transformer():
    model, x = windowed(window_size=(9, 9, 9)), clips()
    vit = VisionTransformer(
        img_size=(32, 40), num_frames=8, **SMALL, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6)
    ).eval()
    vit.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), vit(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shifted", [False, True])
def test_changes_stay_within_a_window_unless_windows_shift(shifted):
    model, x = windowed(window_size=(2, 2, 5), shifted=shifted), clips()
    changed = x.clone()
    changed[:, :, :4, :16] += 1.0  # the first two temporal indices, upper half
    difference = (
        (model(changed) - model(x)).abs().amax(2).view(2, 2, 2, 2, 2, 5)
    )  # B, window, index, window, row, column
    assert (difference[:, 0, :, 0] > 1e-4).all()
    if shifted:
        assert (difference[:, 1] > 1e-6).any()
    else:
        assert difference[:, 1].max() < 1e-6
        assert difference[:, :, :, 1].max() < 1e-6


@pytest.mark.parametrize("window_size", [(2, 0, 7), (2, 7), (2, 7.0, 7)])
def test_invalid_window_sizes_raise(window_size):
    with pytest.raises(ValueError, match="expected three integers"):
        windowed(window_size=window_size)
