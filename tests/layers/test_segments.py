"""Several sequences in one: attention at once, as flash attention does it, against one after another."""

import pytest
import torch
import torch.nn.functional as F

from tubelet.layers import segments
from tubelet.layers.segments import Segments


def slow_varlen_attention(q, k, v, starts_q, starts_k, longest_q, longest_k, scale=None):
    """Tokens [T, heads, d]; sequence i has the tokens from starts[i] to starts[i + 1]."""
    assert torch.equal(starts_q, starts_k)
    assert starts_q.dtype == torch.int32
    assert longest_q == longest_k == int(starts_q.diff().max())
    parts = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), scale=scale).transpose(0, 1)
        for a, b in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("lengths", [(4, 3), (1, 5, 2), (6,)])
def test_segments_at_once_and_one_by_one(lengths, monkeypatch):
    monkeypatch.setattr(segments, "varlen_attn", slow_varlen_attention)
    qkv = torch.randn(3, sum(lengths), 3, 2, 16, dtype=torch.bfloat16)  # the layout of a linear layer
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    functions = (F.scaled_dot_product_attention,) * len(lengths)
    starts = segments._starts(lengths, len(q), q.device)
    expected = Segments(lengths, functions)(q, k, v, scale=0.3)
    measured = Segments(lengths, functions, starts)(q, k, v, scale=0.3)
    torch.testing.assert_close(measured, expected, rtol=2e-2, atol=2e-2)


def test_starts():
    assert segments._starts((4, 3), 2, torch.device("cpu")).tolist() == [0, 4, 7, 11, 14]
    assert segments._starts((2, 1, 3), 2, torch.device("cpu")).tolist() == [0, 2, 3, 6, 8, 9, 12]


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"dtype": torch.float32}, {"width": 12}])
def test_other_attention_is_computed_one_by_one(options, monkeypatch):
    monkeypatch.setattr(segments, "varlen_attn", None)
    x = torch.randn(2, 3, 7, options.get("width", 16), dtype=options.get("dtype", torch.bfloat16))
    starts = segments._starts((4, 3), 2, x.device)
    attend = Segments((4, 3), (F.scaled_dot_product_attention,) * 2, starts)
    assert attend(x, x, x, dropout_p=options.get("dropout_p", 0.0)).shape == x.shape
