import pytest
import torch

from tubelet.models.multiscale import Lateral, MultiscaleTransformer

GRID = (4, 4, 5)


def multiscale(**arguments):
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": 5, "num_heads": 2, "fast_embed_dim": 24, "fast_num_heads": 3}
    options = {**sizes, "frame_stride": 2, "lateral_every": 2, "init_std": 0.1, **arguments}
    model = MultiscaleTransformer((32, 40), 8, 8, **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def clips():
    return torch.randn(3, 3, 8, 32, 40, generator=torch.Generator().manual_seed(1))


def attention(q, k, v, heads, kept):
    """Attention [B, n, D], [B, N, D], [B, N, D] -> [B, n, D] to the keys for which `kept` [B, N] is 1."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).exp() * kept[:, None, None]
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


def run_block(block, x, kept):
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=2)
    x = x + block.attn.proj(attention(q, k, v, block.attn.num_heads, kept))
    return x + block.mlp(block.norm2(x))


def run_lateral(lateral, x, context, kept):
    k, v = lateral.kv(lateral.norm_context(context)).chunk(2, dim=2)
    return x + lateral.proj(attention(lateral.q(lateral.norm_x(x)), k, v, lateral.num_heads, kept))


def all_tokens(model, x, keep, stride):
    """Both paths process every token of the grid; keys are the kept tokens that belong to the path."""
    fast = model.fast_positions.add(model.fast_patch_embed(x))
    slow = model.slow_positions.add(model.slow_patch_embed(x))
    slow = torch.cat([model.cls_token.expand(len(x), -1, -1), slow], dim=1)
    kept = torch.zeros(fast.shape[:2]).scatter(1, keep, 1.0)
    is_slow = torch.arange(4).repeat_interleave(20) % stride == 0
    slow_kept = torch.cat([torch.ones(len(x), 1), kept * is_slow], dim=1)
    for layer in range(len(model.slow_blocks)):
        slow = run_block(model.slow_blocks[layer], slow, slow_kept)
        fast = run_block(model.fast_blocks[layer], fast, kept)
        if layer in (1, 3):
            to_slow, to_fast = model.to_slow[layer // 2], model.to_fast[layer // 2]
            slow, fast = run_lateral(to_slow, slow, fast, kept), run_lateral(to_fast, fast, slow, slow_kept)
    tokens = model.norm(run_lateral(model.readout, model.widen(fast), slow, slow_kept))
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_kept_tokens_equal_all_tokens_under_masks(stride):
    """Clips that keep different numbers of slow tokens; the last one keeps none unless stride is 1."""
    candidates = [torch.arange(80), torch.randperm(80), torch.arange(20, 40)]
    keep = torch.stack([indices[torch.randperm(len(indices))[:12]] for indices in candidates])
    model, x = multiscale(frame_stride=stride), clips()
    torch.testing.assert_close(model(x, keep), all_tokens(model, x, keep, stride), atol=2e-5, rtol=0)


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_unmasked_clip_equals_all_tokens_under_masks(stride):
    model, x = multiscale(frame_stride=stride), clips()
    expected = all_tokens(model, x, torch.arange(80).expand(3, -1), stride)
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=0)


def test_slow_path_selects_its_temporal_indices():
    model, x = multiscale(frame_stride=2), clips()
    index, mask = model._slow_tokens(None, GRID, x)
    assert mask is None
    assert index.tolist() == [[*range(20), *range(40, 60)]] * 3
    keep = torch.tensor([[79, 41, 3, 20], [25, 26, 27, 28], [0, 45, 30, 59]])
    index, mask = model._slow_tokens(keep, GRID, x)
    selected = [row[is_slow].tolist() for row, is_slow in zip(index, mask[:, 0, 0, 1:], strict=True)]
    assert selected == [[41, 3], [], [0, 45, 59]]
    assert mask[..., 0].all()


def test_lateral_attention_equals_torch():
    torch.manual_seed(0)
    lateral = Lateral(24, 48, 3)
    reference = torch.nn.MultiheadAttention(24, 3, kdim=48, vdim=48, batch_first=True)
    with torch.no_grad():
        reference.q_proj_weight.copy_(lateral.q.weight)
        reference.k_proj_weight.copy_(lateral.kv.weight[:24])
        reference.v_proj_weight.copy_(lateral.kv.weight[24:])
        reference.in_proj_bias.copy_(torch.cat([lateral.q.bias, lateral.kv.bias]))
        reference.out_proj.load_state_dict(lateral.proj.state_dict())
    x, context, mask = torch.randn(2, 5, 24), torch.randn(2, 7, 48), torch.rand(2, 7) > 0.3
    normed = lateral.norm_context(context)
    expected = x + reference(lateral.norm_x(x), normed, normed, key_padding_mask=~mask)[0]
    torch.testing.assert_close(lateral(x, context, mask[:, None, None]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", ["slow_patch_embed", "fast_patch_embed"])
def test_every_token_depends_on_both_paths(path):
    model, muted, x = multiscale(), multiscale(), clips()
    getattr(muted, path).proj.weight.data.zero_()
    assert (muted(x) - model(x)).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frame_stride": 0}, "frame_stride 0: must be an integer, at least 1"),
        ({"lateral_every": 0}, "lateral_every 0"),
        ({"fast_num_heads": 5}, "5 heads do not divide the width 24"),
        ({"fast_embed_dim": 30, "uniform_power": False}, "multiple of 8, not 30"),
    ],
)
def test_incompatible_sizes_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        multiscale(**arguments)


def test_all_parameters_are_used_without_lateral_connections():
    model = multiscale(depth=1, lateral_every=2, num_classes=3)
    model(clips()).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
