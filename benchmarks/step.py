"""A complete V-JEPA training step, compared with the same step written with VJEPA2Model of transformers.

Both sides train the same architecture (rotary positions with V-JEPA 2's pairing) on the same clips and masks: encoder
on the context of each mask, EMA encoder on all tokens, predictor, L1 loss, backward pass, gradient clipping, AdamW and
EMA update. There are two versions of the peer. VJEPA2Model.forward runs its encoder on all tokens for each mask.
Calling the layers directly on the context tokens avoids this; then both sides compute the same matrix products.

    python -m benchmarks step
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Row, seconds, time_alternately
from benchmarks.masks import MASKS
from tubelet.data import Batch
from tubelet.grid import ClipShape
from tubelet.masks.multiblock3d import MaskCollator
from tubelet.models import build_encoder, build_predictor
from tubelet.objectives import vjepa
from tubelet.runtime.parallelize import compile_blocks
from tubelet.training.objective import StepRng
from tubelet.training.optimizer import adamw

LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, MOMENTUM = 1e-4, 0.04, 10.0, 0.998


@dataclass(frozen=True)
class Setting:
    """Model and batch sizes of a step; `pred_*` are those of the predictor."""

    model_name: str
    pred_embed_dim: int
    pred_depth: int
    pred_num_heads: int
    batch_size: int
    num_frames: int
    crop_size: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    patch_size: int = 16
    tubelet_size: int = 2

    @property
    def clip(self) -> ClipShape:
        return ClipShape(self.num_frames, self.crop_size, self.patch_size, self.tubelet_size)

    @property
    def name(self) -> str:
        return f"{self.model_name}, {self.num_frames}x{self.crop_size}, batch {self.batch_size}"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


TINY = Setting("vit_tiny", 192, 6, 3, batch_size=2, num_frames=16, crop_size=96)
SMALL = Setting("vit_small", 192, 6, 6, batch_size=2, num_frames=16, crop_size=64)
LARGE_ON_GPU = Setting("vit_large", 384, 12, 12, 24, 16, 224, device="cuda", dtype=torch.bfloat16)


def run(repeats: int = 5) -> list[Row]:
    """Measure small models on the CPU and, if there is a GPU, ViT-L/16 on it."""
    rows = [row for setting in (TINY, SMALL) for row in against_peers(setting, repeats)]
    return rows + (on_gpu(LARGE_ON_GPU, repeats) if torch.cuda.is_available() else [])


def against_peers(setting: Setting, repeats: int) -> list[Row]:
    """Compare with both versions of the peer."""
    batch = make_batch(setting)
    ours = our_step(setting, make_jepa(setting))
    rows = []
    for name, only_context, goal in (
        ("VJEPA2Model.forward", False, 1.5),
        ("VJEPA2Model on context tokens", True, None),
    ):
        peer = transformers_step(setting, make_vjepa2(setting), only_context)
        timing = time_alternately(lambda: ours(*batch), lambda peer=peer: peer(*batch), repeats)
        rows.append(
            Row(
                f"step, {setting.name}; {name}",
                f"{setting.batch_size / timing.ours:.2f} clips/s",
                f"{setting.batch_size / timing.peer:.2f} clips/s",
                timing.ratio,
                goal,
            )
        )
    return rows


def on_gpu(setting: Setting, repeats: int) -> list[Row]:
    """Measure the eager and the compiled step: clips/s, memory, and fraction of the FLOP/s of a matrix product."""
    batch, rows = make_batch(setting), []
    rate = matmul_rate(setting)
    for compiled in (False, True):
        jepa = make_jepa(setting)
        if compiled:
            for part in jepa.parts().values():
                compile_blocks(part)
        step = our_step(setting, jepa)
        for _ in range(3):
            step(*batch)
        torch.cuda.reset_peak_memory_stats()
        duration = statistics.median(seconds(lambda step=step: step(*batch)) for _ in range(4 * repeats))
        memory = torch.cuda.max_memory_allocated() / 2**30
        fraction = flops(setting, batch) / duration / rate
        clips = setting.batch_size / duration
        rows.append(
            Row(
                f"step, {setting.name}, {setting.dtype}, {'compiled' if compiled else 'eager'}",
                f"{clips:.1f} clips/s, {memory:.1f} GiB, {fraction:.0%} of {rate / 1e12:.0f} TFLOP/s",
            )
        )
        del jepa, step
    return rows


def make_batch(setting: Setting) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return noise clips [B, C, T, H, W], and context and target indices of V-JEPA's two masks."""
    torch.manual_seed(0)
    clips = torch.randn(setting.batch_size, 3, setting.num_frames, setting.crop_size, setting.crop_size)
    collator = MaskCollator(MASKS, **setting.clip.as_dict())
    contexts, targets = collator.sample_masks(setting.batch_size, np.random.default_rng(0))
    move = lambda masks: [mask.to(setting.device) for mask in masks]  # noqa: E731
    return clips.to(setting.device), move(contexts), move(targets)


def make_jepa(setting: Setting) -> vjepa.VJEPA:
    torch.manual_seed(0)
    rope = {"use_rope": True, "rope_pairing": "vjepa2"}
    encoder = build_encoder({"name": setting.model_name, **rope}, setting.clip)
    sizes = {name: getattr(setting, f"pred_{name}") for name in ("embed_dim", "depth", "num_heads")}
    predictor = build_predictor({**sizes, **rope}, encoder, setting.clip, num_mask_tokens=len(MASKS))
    # With this mean and standard deviation the float clips stay as they are.
    objective = vjepa.VJEPA(
        encoder, predictor, vjepa.Options(ema=(MOMENTUM, MOMENTUM)), mean=(0.0,) * 3, std=(1 / 255,) * 3
    )
    return objective.to(setting.device)


def our_step(setting: Setting, jepa: vjepa.VJEPA) -> Callable[..., float]:
    """Return Tubelet's training step without logging; a step returns the loss."""
    optimizer = adamw([jepa.encoder, jepa.predictor], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step(clips: Tensor, masks_context: list[Tensor], masks_target: list[Tensor]) -> float:
        index = torch.arange(len(clips), device=clips.device)
        batch = Batch({"clip": clips}, {}, index, ("",) * len(clips), index, 0)
        batch = batch.with_masks(masks_context, masks_target)
        with setting.autocast():
            loss = jepa(batch, StepRng(seed=0, step=0, first_sample=0))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        jepa.on_update(0)
        return loss.item()

    return step


def make_vjepa2(setting: Setting) -> nn.Module:
    """Build the model of transformers with the same sizes."""
    return vjepa2_like(make_jepa(setting), setting)


def vjepa2_like(jepa: vjepa.VJEPA, setting: Setting) -> nn.Module:
    """Build the model of transformers with the sizes of `jepa`, whose weights may be on the device `meta`."""
    from transformers import VJEPA2Config, VJEPA2Model

    encoder, predictor = jepa.encoder, jepa.predictor
    torch.manual_seed(0)
    config = VJEPA2Config(
        patch_size=setting.patch_size,
        crop_size=setting.crop_size,
        frames_per_clip=setting.num_frames,
        tubelet_size=setting.tubelet_size,
        hidden_size=encoder.embed_dim,
        num_attention_heads=encoder.num_heads,
        num_hidden_layers=len(encoder.blocks),
        pred_hidden_size=predictor.predictor_embed_dim,
        pred_num_attention_heads=predictor.num_heads,
        pred_num_hidden_layers=len(predictor.predictor_blocks),
        pred_num_mask_tokens=len(MASKS),
    )
    with torch.device(setting.device):
        return VJEPA2Model(config)


def transformers_step(
    setting: Setting, model: nn.Module, only_context: bool, compiled: bool = False
) -> Callable[..., float]:
    """Return the same training step for a model of transformers.

    Args:
        setting: Sizes of the step.
        model: The model.
        only_context: Call the layers on the context tokens only, instead of VJEPA2Model.forward.
        compiled: Compile each layer.
    """
    target_model = copy.deepcopy(model).requires_grad_(False)
    if compiled:
        for part in (model.encoder, model.predictor, target_model.encoder):
            for layer in part.layer:
                layer.compile()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    predict = predict_from_context if only_context else predict_with_forward

    def step(clips: Tensor, masks_context: list[Tensor], masks_target: list[Tensor]) -> float:
        videos = clips.transpose(1, 2)  # transformers expects [B, T, C, H, W]
        with setting.autocast():
            with torch.no_grad():
                features = target_model.get_vision_features(videos)
                features = F.layer_norm(features, features.shape[-1:])
            loss = 0.0
            for context, target in zip(masks_context, masks_target, strict=True):
                prediction = predict(model, videos, context, target)
                expected = torch.gather(features, 1, target[..., None].expand(-1, -1, features.shape[-1]))
                loss = loss + F.l1_loss(prediction, expected) / len(masks_context)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(target_model.parameters(), model.parameters(), strict=True):
                average.mul_(MOMENTUM).add_(parameter, alpha=1 - MOMENTUM)
        return loss.item()

    return step


def predict_with_forward(model: nn.Module, videos: Tensor, context: Tensor, target: Tensor) -> Tensor:
    """Return the predictions [B, Kt, D] of VJEPA2Model.forward, whose encoder also attends to the target tokens."""
    return model(videos, context_mask=[context], target_mask=[target]).predictor_output.last_hidden_state


def predict_from_context(model: nn.Module, videos: Tensor, context: Tensor, target: Tensor) -> Tensor:
    """Return predictions [B, Kt, D] with encoder layers that run on the context tokens only."""
    tokens = model.encoder.embeddings(videos)
    index = context[..., None].expand(-1, -1, tokens.shape[-1])
    hidden = torch.gather(tokens, 1, index)
    for layer in model.encoder.layer:
        hidden = layer(hidden, context)[0]
    hidden = model.encoder.layernorm(hidden)
    # The predictor expects all tokens and selects the context itself.
    scattered = torch.zeros_like(tokens, dtype=hidden.dtype).scatter(1, index, hidden)
    return model.predictor(scattered, [context], [target]).last_hidden_state


def flops(setting: Setting, batch: tuple[Tensor, list[Tensor], list[Tensor]]) -> int:
    """Count the floating-point operations of Tubelet's step: matrix products and attention."""
    step = our_step(setting, make_jepa(setting))
    with FlopCounterMode(display=False) as counter:
        step(*batch)
    return counter.get_total_flops()


def matmul_rate(setting: Setting, size: int = 8192) -> float:
    """Measure the FLOP/s of a product of two square matrices on the device and with the dtype of the setting."""
    a = torch.randn(size, size, device=setting.device, dtype=setting.dtype)
    synchronize = torch.cuda.synchronize if setting.device == "cuda" else lambda: None

    def products() -> None:
        for _ in range(10):
            a @ a
        synchronize()

    products()
    return 10 * 2 * size**3 / min(seconds(products) for _ in range(5))
