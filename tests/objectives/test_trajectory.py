"""The steps of V-JEPA's own trainer, reproduced: schedules, separate clipping, weight decay groups, EMA."""

import zlib

import pytest
import torch

from tubelet.data import Batch
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.objectives import vjepa
from tubelet.runtime.distributed import World
from tubelet.training.options import LoggingConfig, MetaConfig, TrainingOptions
from tubelet.training.schedules import OptimizationConfig, Schedule
from tubelet.training.trainer import Trainer

SIZES = {"img_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
STEPS_PER_EPOCH, EPOCHS = 4, 6

# Losses of facebookresearch/jepa (its encoder, predictor, schedulers and the body of `train_step`) from the weights of
# `fill` on the clips and masks of `make_batch`, fp32 on a CPU, with lr 2e-4 -> 4e-3 over 2 epochs -> 1e-6, weight decay
# 0.04 -> 0.4, momentum 0.9 -> 1, schedules stretched by 1.25, and clip_grad 0.05.
PUBLISHED = [
    1.2547112, 1.1982294, 1.1306889, 1.0616257, 0.985797, 0.9296957, 0.9075586, 0.8408093,
    0.8136465, 0.7988415, 0.7881364, 0.7615957, 0.7532983, 0.7402983, 0.7258991, 0.7283321,
    0.7092423, 0.7083094, 0.7108686, 0.6958622, 0.7029811, 0.6837248, 0.6834164, 0.684286,
]  # fmt: skip


def fill(module):
    """Set weights that depend on nothing but the names of the parameters."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.2 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
            )
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return module


def make_batch(step, size=4, tokens=32):
    generator = torch.Generator().manual_seed(step)
    clips = torch.randint(256, (size, 3, 4, 32, 32), generator=generator, dtype=torch.uint8)
    orders = [torch.stack([torch.randperm(tokens, generator=generator) for _ in range(size)]) for _ in range(2)]
    context = tuple(order[:, :count].sort(1).values for order, count in zip(orders, (8, 12), strict=True))
    target = tuple(order[:, -count:].sort(1).values for order, count in zip(orders, (20, 14), strict=True))
    index = torch.arange(size)
    return Batch({"clip": clips}, {"label": index}, index, ("",) * size, index, step).with_masks(context, target)


def trajectory(folder, **optimization):
    """Losses of 24 steps of the Trainer."""
    model = {"embed_dim": 48, "depth": 2, "num_heads": 4, "uniform_power": True}
    encoder = fill(VisionTransformer(**SIZES, **model, norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6)))
    predictor = fill(
        VisionTransformerPredictor(
            **SIZES, embed_dim=48, predictor_embed_dim=24, depth=2, num_heads=4, uniform_power=True,
            use_mask_tokens=True, norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
        )
    )  # fmt: skip
    options = TrainingOptions(
        app="vjepa",
        folder=str(folder),
        optimization=OptimizationConfig(
            start_lr=2e-4, lr=4e-3, final_lr=1e-6, warmup=2, weight_decay=0.04, final_weight_decay=0.4,
            **{"clip_grad": 0.05, "clip_separately": True, "clip_start_epoch": 3} | optimization,
        ),
        meta=MetaConfig(dtype="float32"),
        logging=LoggingConfig(monitor_clips=0),
    )  # fmt: skip
    schedule = Schedule(options.optimization, EPOCHS * STEPS_PER_EPOCH, STEPS_PER_EPOCH, stretch=1.25)
    objective = vjepa.VJEPA(encoder, predictor, vjepa.Options(ema=(0.9, 1.0)), schedule_steps=schedule.length)
    trainer = Trainer(objective, options, schedule, World(), global_batch=4)
    return [float(trainer.train_step(make_batch(step))["loss"].detach()) for step in range(len(PUBLISHED))]


def test_trainer_follows_the_published_trajectory(tmp_path):
    assert trajectory(tmp_path) == pytest.approx(PUBLISHED, rel=2e-6)


@pytest.mark.parametrize("change", [{"clip_separately": False}, {"clip_start_epoch": None}])
def test_trajectory_depends_on_how_and_when_gradients_are_clipped(tmp_path, change):
    differences = [abs(a - b) / b for a, b in zip(trajectory(tmp_path, **change), PUBLISHED, strict=True)]
    assert max(differences[:8]) < 2e-6
    assert max(differences) > 1e-4
