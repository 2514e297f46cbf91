import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tubelet.layers import MLP, Attention, Block, CrossAttention, CrossAttentionBlock, PatchEmbed, PatchEmbed3D, SwiGLU
from tubelet.layers.attention import attention
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.rope import rope_tables, rotate


def attention_loop(q, k, v, scale):
    """Attention with a loop over queries; q [n, d], k and v [N, d]."""
    return torch.stack([((k @ query) * scale).softmax(0) @ v for query in q])


@pytest.mark.parametrize("qk_scale", [None, 0.05, 2.0])
@pytest.mark.parametrize("rope", [False, True])
def test_attention_equals_a_loop(qk_scale, rope):
    layer = Attention(36, num_heads=3, qkv_bias=True, qk_scale=qk_scale)
    x = torch.randn(2, 6, 36)
    tables = rope_tables(12, (1, 2, 3)) if rope else None
    qkv = layer.qkv(x).view(2, 6, 3, 3, 12)
    q, k, v = qkv.unbind(2)
    if rope:
        q, k = rotate(qkv[:, :, :2], tables).unbind(2)
    scale = 12**-0.5 if qk_scale is None else qk_scale
    mixed = [
        torch.cat([attention_loop(q[b, :, h], k[b, :, h], v[b, :, h], scale) for h in range(3)], dim=1)
        for b in range(2)
    ]
    torch.testing.assert_close(layer(x, tables), layer.proj(torch.stack(mixed)), atol=1e-5, rtol=0)


def test_attention_on_a_cpu_is_exact_under_autocast():
    q, k, v = torch.randn(3, 2, 4, 10, 8).bfloat16().unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(q, k, v)
    exact = (q.float() @ k.float().mT * 8**-0.5).softmax(-1) @ v.float()
    assert mixed.dtype == torch.bfloat16
    rounding = 1.001 * 2**-8  # of bf16, relative
    torch.testing.assert_close(mixed.float(), exact, rtol=rounding, atol=1e-6)
    in_bf16 = F.scaled_dot_product_attention(q, k, v).float()  # rounds the attention weights, too
    assert ((in_bf16 - exact).abs() > rounding * exact.abs() + 1e-6).any()


@pytest.mark.parametrize("use_proj", [True, False])
def test_cross_attention_equals_a_loop(use_proj):
    layer = CrossAttention(24, num_heads=2, qkv_bias=True, use_proj=use_proj)
    queries, x = torch.randn(2, 3, 24), torch.randn(2, 7, 24)
    q = layer.q(queries).view(2, 3, 2, 12)
    k, v = layer.kv(x).view(2, 7, 2, 2, 12).unbind(2)
    mixed = torch.stack(
        [
            torch.cat([attention_loop(q[b, :, h], k[b, :, h], v[b, :, h], 12**-0.5) for h in range(2)], dim=1)
            for b in range(2)
        ]
    )
    expected = layer.proj(mixed) if use_proj else mixed
    torch.testing.assert_close(layer(queries, x), expected, atol=1e-5, rtol=0)
    assert any(name.startswith("proj") for name in layer.state_dict()) == use_proj


def test_cross_attention_block_normalizes_only_the_tokens():
    block = CrossAttentionBlock(24, num_heads=2)
    q, x = torch.randn(2, 1, 24), torch.randn(2, 5, 24)
    y = q + block.xattn(q, block.norm1(x))
    torch.testing.assert_close(block(q, x), y + block.mlp(block.norm2(y)))


@pytest.mark.parametrize("use_silu", [False, True])
def test_dropout_is_active_only_in_training(use_silu):
    block = Block(24, 2, drop=0.3, attn_drop=0.3, use_silu=use_silu)
    x = torch.randn(2, 6, 24)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    without = Block(24, 2, use_silu=use_silu)
    without.load_state_dict(block.state_dict())
    assert torch.equal(block(x), without(x))


def test_attention_dropout_has_an_effect():
    layer = Attention(24, 2, attn_drop=0.5)
    x = torch.randn(2, 6, 24)
    assert not torch.equal(layer(x), layer(x))


def test_swiglu():
    layer = SwiGLU(12, 48)
    assert layer.fc1.out_features == 32  # two thirds of 48
    assert SwiGLU(12, 48, wide_silu=False).fc1.out_features == 48
    assert SwiGLU(12, 40).fc1.out_features == 32  # 26 rounded up to a multiple of 8
    x = torch.randn(3, 12)
    gate = layer.fc1(x)
    torch.testing.assert_close(layer(x), layer.fc3(gate * torch.sigmoid(gate) * layer.fc2(x)))


def test_mlp_sizes():
    layer = MLP(8, 16, 4)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), layer.fc2(F.gelu(layer.fc1(x))))
    assert layer(x).shape == (3, 4)


def test_patch_embedding_of_kept_tokens_equals_indexing_all_tokens():
    for layer, x, count in [
        (PatchEmbed3D(4, 2, embed_dim=10), torch.randn(3, 3, 6, 8, 12), 18),
        (PatchEmbed(4, embed_dim=10), torch.randn(3, 3, 8, 12), 6),
    ]:
        keep = torch.stack([torch.randperm(count)[:4] for _ in range(3)])
        tokens = layer(x)
        assert tokens.shape == (3, count, 10)
        expected = tokens.gather(1, keep[..., None].expand(-1, -1, 10))
        torch.testing.assert_close(layer(x, keep), expected, atol=1e-5, rtol=0)


def test_patches_are_in_time_major_order():
    layer = PatchEmbed3D(2, 2, in_chans=1, embed_dim=1)
    nn.init.constant_(layer.proj.weight, 1 / 8)
    nn.init.zeros_(layer.proj.bias)
    x = torch.zeros(1, 1, 4, 4, 6)
    x[0, 0, 2:4, 2:4, 4:6] = 1.0  # temporal index 1, row 1, column 2 of a 2x2x3 grid
    assert layer(x)[0, :, 0].nonzero().tolist() == [[(1 * 2 + 1) * 3 + 2]]


@pytest.mark.parametrize(("use_silu", "output"), [(False, "fc2"), (True, "fc3")])
def test_depth_rescaling_applies_to_the_output_layers_only(use_silu, output):
    blocks = nn.ModuleList(Block(96, 2, use_silu=use_silu) for _ in range(4))
    init_weights(blocks, 0.02)
    before = [[block.attn.proj.weight.clone(), getattr(block.mlp, output).weight.clone()] for block in blocks]
    untouched = blocks[2].mlp.fc1.weight.clone()
    rescale_blocks(blocks)
    for layer, (block, (proj, out)) in enumerate(zip(blocks, before, strict=True), start=1):
        torch.testing.assert_close(block.attn.proj.weight, proj / (2 * layer) ** 0.5)
        torch.testing.assert_close(getattr(block.mlp, output).weight, out / (2 * layer) ** 0.5)
    assert torch.equal(blocks[2].mlp.fc1.weight, untouched)
    assert abs(blocks[0].mlp.fc1.weight.std().item() / 0.02 - 1) < 0.05


@pytest.mark.parametrize("layer", [Attention, CrossAttention])
def test_num_heads_must_divide_the_width(layer):
    with pytest.raises(ValueError, match="5 heads do not divide the width 24"):
        layer(24, num_heads=5)
