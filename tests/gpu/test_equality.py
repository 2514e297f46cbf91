"""Losses, features and gradients of a GPU are those of the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu.steps import encode_each_mask_by_itself
from tests.gpu.conftest import CPU, OBJECTIVES
from tubelet.grid import ClipShape
from tubelet.layers.segments import attend_in_segments
from tubelet.models import build_encoder, build_predictor
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.runtime.attention_kernels import attention_kernels

pytestmark = pytest.mark.gpu
CLIP = ClipShape(num_frames=8, crop_size=(32, 48), patch_size=8, tubelet_size=2)
# Terms that depend on draws of the device's own generator, which are others than the CPU's.
RANDOM = {
    "lejepa": {"loss", "loss_sigreg", "loss_clip_sigreg"},
    "levjepa": {"loss", "loss_sigreg", "loss_slot_sigreg"},
    "vjepa-diffusion": {"loss", "loss_jepa"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 3e-2)])
def test_losses(objective, dtype, tolerance, device, run):
    ours = run(objective, device, f"meta.dtype={dtype}")
    reference = run(objective, CPU, "meta.dtype=float32", folder="reference")
    batch = ours.batches[0]
    measured = ours.trainer.forward_backward(batch, len(batch))
    expected = reference.trainer.forward_backward(batch, len(batch))
    assert measured.keys() == expected.keys()
    for name in expected.keys() - RANDOM.get(objective, set()):
        assert float(measured[name]) == pytest.approx(float(expected[name]), rel=tolerance, abs=tolerance / 10), name
    if objective not in RANDOM and dtype == "float32":
        pairs = zip(ours.trainer.objective.parameters(), reference.trainer.objective.parameters(), strict=True)
        for p, q in pairs:
            if q.grad is not None:
                error = (p.grad.cpu() - q.grad).norm()
                assert error <= 0.01 * q.grad.norm() + 1e-6


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny", {}),
        ("vit_tiny", {"use_rope": True}),
        ("vit_tiny", {"use_rope": True, "use_silu": True}),
        ("timesformer_tiny", {}),
        ("fastback_tiny", {}),
        ("sparse_tiny", {}),
        ("windowed_tiny", {"window_size": (2, 2, 3)}),
        ("vivit_tiny", {}),
        ("multiscale_tiny", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "default",
)
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "kept tokens"])
def test_encoders(name, options, masked, device):
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "depth": 2, **options}, CLIP).eval()
    on_device = copy.deepcopy(encoder).to(device)
    video = torch.randn(2, 3, 8, 32, 48)
    mask = None
    if masked:
        if not encoder.accepts_masks:
            pytest.skip(f"{name} cannot drop tokens")
        mask = torch.stack([torch.randperm(encoder.grid.num_tokens)[:40].sort().values for _ in range(2)])
    expected = encoder(video, mask)
    measured = on_device(video.to(device), None if mask is None else mask.to(device))
    torch.testing.assert_close(measured.cpu(), expected, rtol=1e-2, atol=1e-2)
    expected.square().mean().backward()
    measured.square().mean().backward()
    for p, q in zip(on_device.parameters(), encoder.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad.cpu() - q.grad).norm() <= 0.02 * q.grad.norm() + 1e-6


@pytest.mark.parametrize("use_mask_tokens", [True, False], ids=["mask tokens", "diffusion"])
def test_predictor(use_mask_tokens, device):
    torch.manual_seed(0)
    encoder = build_encoder({"name": "vit_tiny", "depth": 1}, CLIP)
    options = {"embed_dim": 48, "depth": 2, "num_heads": 2, "use_mask_tokens": use_mask_tokens}
    predictor = build_predictor(options, encoder, CLIP, num_mask_tokens=2).eval()
    assert isinstance(predictor, VisionTransformerPredictor)
    order = torch.stack([torch.randperm(encoder.grid.num_tokens) for _ in range(2)])
    context, target = order[:, :30].sort(1).values, order[:, 30:60].sort(1).values
    inputs = [torch.randn(2, 30, encoder.embed_dim), torch.randn(2, 30, encoder.embed_dim), context, target]
    noise = {} if use_mask_tokens else {"noise": torch.randn(2, 30, 48), "timestep": torch.tensor([3, 500])}
    expected = predictor(*inputs, 0, **noise)
    on_device = copy.deepcopy(predictor).to(device)
    noise = {name: value.to(device) for name, value in noise.items()}
    measured = on_device(*(x.to(device) for x in inputs), 0, **noise)
    torch.testing.assert_close(measured.cpu(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("objective", ["vjepa", "vjepa-rotary"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_masks_together_and_one_by_one(objective, dtype, tolerance, device, run):
    together = run(objective, device, f"meta.dtype={dtype}")
    apart = run(objective, device, f"meta.dtype={dtype}", folder="apart")
    encode_each_mask_by_itself(apart.trainer.objective)
    for batch in together.batches[:2]:
        a, b = (float(r.trainer.train_step(batch)["loss"]) for r in (together, apart))
        assert a == pytest.approx(b, rel=tolerance)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_attention_in_segments(head_dim, gpu):
    """All segments in one call of flash attention, their gradients included, against one after another in fp32."""
    lengths, functions = (40, 17, 101), (F.scaled_dot_product_attention,) * 3
    qkv = torch.randn(4, sum(lengths), 3, 6, head_dim, device=gpu, dtype=torch.bfloat16)
    weight = torch.randn(4, 6, sum(lengths), head_dim, device=gpu)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = qkv.to(dtype, copy=True).requires_grad_()
        with attention_kernels("flash", gpu):
            attend = attend_in_segments(lengths, functions, x.flatten(2))
        assert attend.starts is not None
        y = attend(*x.permute(2, 0, 3, 1, 4))
        (y.float() * weight).sum().backward()
        results.append((y.float(), x.grad.float()))
    for measured, expected in zip(*results, strict=True):
        assert (measured - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("objective", ["vjepa", "vjepa-rotary"])
def test_compiled(objective, gpu, run):
    eager = run(objective, gpu, "meta.dtype=float32")
    compiled = run(objective, gpu, "meta.dtype=float32", "meta.compile=true", folder="compiled")
    for batch in eager.batches[:2]:
        a, b = (float(r.trainer.train_step(batch)["loss"]) for r in (eager, compiled))
        assert a == pytest.approx(b, rel=1e-3)
