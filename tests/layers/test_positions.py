import math

import pytest
import torch

from tubelet.grid import Grid
from tubelet.layers.positions import Positions, sincos_2d, sincos_3d
from tubelet.layers.rope import rope_tables, rotate


def sincos_loop(dims, coordinates):
    """Sin-cos embedding of one token, axis by axis and channel by channel."""
    row = []
    for dim, position in zip(dims, coordinates, strict=True):
        angles = [position / 10000 ** (i / (dim / 2)) for i in range(dim // 2)]
        row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return row


@pytest.mark.parametrize(("width", "uniform"), [(48, False), (48, True), (64, True), (192, True), (40, False)])
def test_sincos_3d_equals_a_loop(width, uniform):
    t, h, w = grid = (3, 4, 2)
    dims = [2 * math.ceil(width / 6)] * 3 if uniform else [width // 2, width // 4, width // 4]
    expected = [sincos_loop(dims, (i, y, x))[:width] for i in range(t) for y in range(h) for x in range(w)]
    torch.testing.assert_close(sincos_3d(width, grid, uniform), torch.tensor(expected), atol=1e-6, rtol=0)


def test_sincos_2d_equals_a_loop():
    expected = [sincos_loop([24, 24], (y, x)) for y in range(4) for x in range(3)]
    torch.testing.assert_close(sincos_2d(48, (1, 4, 3)), torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("make", "width"), [(sincos_2d, 50), (sincos_3d, 52)])
def test_widths_that_cannot_be_split_among_the_axes_raise(make, width):
    with pytest.raises(ValueError, match="multiple of"):
        make(width, (2, 2, 2))


@pytest.mark.parametrize("head_dim", [16, 20, 24, 64])
def test_interleaved_rotation_equals_complex_multiplication(head_dim):
    grid = (2, 3, 4)
    x = torch.randn(2, 24, 2, 3, head_dim)
    dim = head_dim // 3 // 2 * 2
    expected = x.clone()
    for axis in range(3):
        for pair in range(dim // 2):
            omega = 10000 ** (-pair / (dim // 2))
            channels = slice(axis * dim + 2 * pair, axis * dim + 2 * pair + 2)
            for token in range(24):
                position = (token // 12, token // 4 % 3, token % 4)[axis]
                z = torch.view_as_complex(x[:, token, :, :, channels].contiguous())
                rotated = z * complex(math.cos(position * omega), math.sin(position * omega))
                expected[:, token, :, :, channels] = torch.view_as_real(rotated)
    torch.testing.assert_close(rotate(x, rope_tables(head_dim, grid)), expected, atol=1e-5, rtol=0)


def test_only_interleaved_pairing_makes_products_depend_on_distance_alone():
    """Relative positions are the defining property of RoPE, which the pairing of V-JEPA 2 lacks."""
    grid, head_dim = (1, 1, 6), 24
    q, k = torch.randn(2, head_dim)
    both = torch.stack([q, k])[None, None, :, None].expand(1, 6, 2, 1, head_dim)
    errors = {}
    for pairing in ("interleaved", "vjepa2"):
        rotated = rotate(both, rope_tables(head_dim, grid, pairing))[0, :, :, 0]
        products = rotated[:, 0] @ rotated[:, 1].T
        errors[pairing] = (products[1:, 1:] - products[:-1, :-1]).abs().max().item()
    assert errors["interleaved"] < 1e-4
    assert errors["vjepa2"] > 1e-2


@pytest.mark.parametrize("pairing", ["interleaved", "vjepa2"])
def test_rotation_is_the_same_when_compiled(pairing):
    """Compiled code uses real arithmetic, eager code complex numbers."""
    tables, weight = rope_tables(26, (2, 3, 4), pairing), torch.randn(2, 24, 2, 3, 26)
    x = torch.randn(2, 24, 3, 3, 26)[:, :, :2].requires_grad_()
    compiled = torch.compile(rotate, fullgraph=True, backend="eager")(x, tables)
    torch.testing.assert_close(compiled, rotate(x, tables))
    gradients = (torch.autograd.grad((y * weight).sum(), x) for y in (compiled, rotate(x, tables)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairing", ["interleaved", "vjepa2"])
def test_rotation_keeps_the_dtype_under_low_precision_and_in_a_cast_model(dtype, pairing):
    positions = Positions(24, 2, (1, 2, 2), use_rope=True, rope_pairing=pairing)
    x = torch.randn(1, 4, 2, 1, 12)
    expected = rotate(x, positions.rope())
    assert rotate(x.to(dtype), positions.rope()).dtype == dtype
    cast = rotate(x.to(dtype), positions.to(dtype).rope())
    assert cast.dtype == dtype
    torch.testing.assert_close(cast.float(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("head_dim", [4, 15])
def test_rope_needs_an_even_head_width_of_at_least_6(head_dim):
    with pytest.raises(ValueError, match="even number of channels"):
        rope_tables(head_dim, (1, 2, 2))


def test_interpolated_positions_are_linear_between_the_configured_ones():
    positions = Positions(48, 3, (4, 2, 2))
    interpolated = positions.add(torch.zeros(1, 2 * 2 * 2, 48), grid=(2, 2, 2)).view(2, 4, 48)
    configured = positions.pos_embed.view(4, 4, 48)
    torch.testing.assert_close(interpolated, (configured[0::2] + configured[1::2]) / 2)  # centers are midway


def test_positions_are_not_in_the_state_dict():
    assert not Positions(48, 3, (4, 2, 2)).state_dict()
    assert not Positions(48, 3, (4, 2, 2), use_rope=True).state_dict()


def test_rope_extent_spreads_rows_and_columns_over_the_same_positions_for_every_size():
    """First and last row are those of a 4 x 4 grid; a grid of that size is unchanged; time is."""
    plain = rope_tables(12, Grid(3, 4, 4)).rotation
    torch.testing.assert_close(rope_tables(12, Grid(3, 4, 4), extent=4).rotation, plain)
    wide = rope_tables(12, Grid(3, 7, 4), extent=4).rotation.view(3, 7, 4, -1)
    torch.testing.assert_close(wide[:, ::2], plain.view(3, 4, 4, -1))
    assert rope_tables(12, Grid(1, 1, 1), extent=4).rotation.isfinite().all()
