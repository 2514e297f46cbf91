import pytest
import torch

from benchmarks.attention import LAYERS, WIDTH, Curve, draw, exponent, measure, peak_bytes
from tubelet.layers.mixing import RegularAttention


def test_layers_are_measured_and_plotted(tmp_path):
    curves = measure(((2, 32), (2, 64)), repeats=1, patience=float("inf"))
    assert set(curves) == set(LAYERS)
    for curve in curves.values():
        assert curve.tokens == [8, 32]
        assert min(curve.forward + curve.backward) > 0
        assert curve.backward_bytes > curve.forward_bytes
    draw(curves, str(tmp_path / "attention_speed.svg"))
    assert (tmp_path / "attention_speed.svg").stat().st_size > 10_000


def test_divided_attention_is_over_time_then_over_space():
    layer = LAYERS["regular, divided"]((3, 2, 2))
    x = torch.randn(1, 12, WIDTH, requires_grad=True)
    layers = layer.__closure__[1].cell_contents
    time, space = (m for m in layers if isinstance(m, RegularAttention))
    y = torch.stack([time(x[:, location::4]) for location in range(4)], dim=2).flatten(1, 2)
    expected = torch.cat([space(y[:, 4 * frame : 4 * frame + 4]) for frame in range(3)], dim=1)
    torch.testing.assert_close(layer(x), expected)


def test_exponent_is_the_log_log_slope():
    tokens = [100, 1_000, 4_000, 16_000, 60_000]
    curve = Curve(tokens=tokens)
    values = [1.0, *(1e-6 * n**1.3 for n in tokens[1:4]), 1.0]  # points outside the range are ignored
    assert exponent(curve, values) == pytest.approx(1.3)
    assert exponent(Curve(tokens=tokens[:2]), [1.0, 2.0]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts tensors on the CPU")
def test_peak_memory_counts_live_tensors():
    def three_in_a_row():
        x = torch.ones(1000)
        for _ in range(3):
            x = x + 1  # both are alive
        return x.view(10, 100)

    assert peak_bytes(three_in_a_row) == 2 * 4000
