"""Masked latent prediction over video and sound, against loops over clips, masks and tokens."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tubelet import objectives
from tubelet.data import Batch, to_float
from tubelet.grid import ClipShape, Grid, SoundShape
from tubelet.layers.joint_positions import JointPositions
from tubelet.masks import MaskCollator, build_collator
from tubelet.models import ENCODERS
from tubelet.objectives import Setup
from tubelet.objectives.audio_visual_jepa import Options, spread
from tubelet.training.objective import StepRng

CLIP = ClipShape(num_frames=4, crop_size=32, patch_size=8, tubelet_size=2)  # 2 x 4 x 4 tokens
SOUND = SoundShape(num_samples=1600, sample_rate=1600, channels=2)  # 5 x 2 tokens
MASK = {"num_blocks": 1, "spatial_scale": [0.4, 0.4]}
ENCODER = {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "init_std": 0.2}
RNG = StepRng(seed=0, step=0, first_sample=0)


def make_setup(sound=SOUND, encoder=ENCODER):
    masks = build_collator([MASK, {**MASK, "num_blocks": 2}], CLIP)
    return Setup(ENCODERS.parse(encoder), CLIP, masks, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 10, sound)


def make_options(**changes):
    raw = {
        "predictor": {"depth": 1, "embed_dim": 16, "num_heads": 2, "init_std": 0.2},
        "sound_encoder": {**ENCODER, "depth": 2},
        "spectrogram": {"window": 0.05, "hop": 0.05, "num_bands": 8, "patch_size": 4},
        "sound_mask": [MASK, MASK],
    }
    return Options.model_validate({**raw, **changes})


def make_jepa(**changes):
    torch.manual_seed(0)
    jepa = objectives.build(make_options(**changes), make_setup())
    with torch.no_grad():  # so that it matters whose features are taken, and of which modality a token is
        for name, parameter in jepa.named_parameters():
            if name.startswith("target_") or name.endswith("_embed") or "mask_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return jepa


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    views = {
        "clip": torch.randint(256, (3, 3, 4, 32, 32), generator=generator, dtype=torch.uint8),
        "sound": 0.3 * torch.randn(3, 2, 1600, generator=generator),
    }
    setup, index = make_setup(), torch.arange(3)
    masks = MaskCollator([*setup.masks.samplers, *objectives.further_masks(make_options(), setup)])
    empty = Batch(views, {"label": index}, index, ("",) * 3, index, 0)
    return empty.with_masks(*masks.sample_masks(3, np.random.default_rng(0)))


def slow_embeddings(jepa):
    """Position and modality embedding of each joint token, from the definition."""
    positions, rows = jepa.predictor.positions, []

    def sincos(dim, position):
        angles = [position * 10000 ** (-i / (dim / 2)) for i in range(dim // 2)]
        return [*np.sin(angles), *np.cos(angles)]

    for t in range(2):  # the shortest token lasts a fifth of the clip
        rows += [sincos(8, (t + 0.5) * 5 / 2) + sincos(4, y) + sincos(4, x) for y in range(4) for x in range(4)]
    rows += [sincos(8, t + 0.5) + sincos(8, band) for t in range(5) for band in range(2)]
    learned = torch.stack([positions.video_embed] * 32 + [positions.sound_embed] * 10)
    return torch.tensor(rows, dtype=torch.float32) + learned


def slow_losses(jepa, batch):
    """Mean errors of video and sound: mask by mask, clip by clip, token by token."""
    video, sound, predictor = to_float(batch.clips, jepa.mean, jepa.std), batch.views["sound"], jepa.predictor
    embeddings, errors = slow_embeddings(jepa), {"video": [[], []], "sound": [[], []]}
    for index in (0, 1):
        for b in range(3):
            seen, heard = (batch.masks_context[i][b] for i in (index, index + 2))
            unseen, unheard = (batch.masks_target[i][b] for i in (index, index + 2))
            context = torch.cat(
                [jepa.encoder(video[b : b + 1], seen[None]), jepa.sound_encoder(sound[b : b + 1], heard[None])], 1
            )
            inputs = [*predictor.predictor_embed(context)[0]]
            inputs += [predictor.mask_tokens[index][0, 0]] * (len(unseen) + len(unheard))
            numbers = [*seen.tolist(), *(heard + 32).tolist(), *unseen.tolist(), *(unheard + 32).tolist()]
            x = torch.stack([token + embeddings[n] for token, n in zip(inputs, numbers, strict=True)])[None]
            for block in predictor.predictor_blocks:
                x = block(x)
            predicted = predictor.predictor_proj(predictor.predictor_norm(x))[0, context.shape[1] :]
            features = [jepa.target_encoder(video[b : b + 1])[0, i] for i in unseen]
            features += [jepa.target_sound_encoder(sound[b : b + 1])[0, i] for i in unheard]
            for k, (prediction, feature) in enumerate(zip(predicted, features, strict=True)):
                error = (prediction - F.layer_norm(feature, (24,))).abs().mean()
                errors["video" if k < len(unseen) else "sound"][index].append(error)
    return {name: sum(torch.stack(of_mask).mean() for of_mask in both) / 2 for name, both in errors.items()}


def test_loss_against_a_loop(batch):
    jepa = make_jepa(sound_coeff=0.5)
    found, expected = jepa(batch, RNG), slow_losses(jepa, batch)
    torch.testing.assert_close(found["loss_video"], expected["video"].detach())
    torch.testing.assert_close(found["loss_sound"], expected["sound"].detach())
    torch.testing.assert_close(found["loss"], expected["video"] + 0.5 * expected["sound"])


def test_each_modality_helps_to_predict_the_other(batch):
    jepa = make_jepa()
    before = jepa(batch, RNG)
    other_sound = dataclasses.replace(batch, views={**batch.views, "sound": batch.views["sound"].flip(0)})
    other_clips = dataclasses.replace(batch, views={**batch.views, "clip": batch.clips.flip(0)})
    assert jepa(other_sound, RNG)["loss_video"] != before["loss_video"]
    assert jepa(other_clips, RNG)["loss_sound"] != before["loss_sound"]


@pytest.mark.parametrize("use_mask_tokens", [True, False])
def test_gradients_reach_all_that_is_trained_and_no_target(batch, use_mask_tokens):
    jepa = make_jepa(
        std_coeff=1.0,
        cov_coeff=1.0,
        inv_coeff=1.0,
        predictor={"depth": 1, "embed_dim": 16, "num_heads": 2, "use_mask_tokens": use_mask_tokens},
    )
    losses = jepa(batch, RNG)
    losses["loss"].backward()
    for name, parameter in jepa.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("target_")), name
    assert {"loss_jepa", "loss_std", "loss_cov", "loss_inv", "spread_video", "spread_sound"} < losses.keys()


def test_both_targets_are_moving_averages(batch):
    jepa = make_jepa(ema=[0.9, 1.0])
    pairs = [(jepa.target_encoder, jepa.encoder), (jepa.target_sound_encoder, jepa.sound_encoder)]
    before = [[p.clone() for p in target.parameters()] for target, _ in pairs]
    assert jepa.on_update(0) == {"momentum": 0.9}
    for (target, module), old in zip(pairs, before, strict=True):
        for average, start, ours in zip(target.parameters(), old, module.parameters(), strict=True):
            torch.testing.assert_close(average, 0.9 * start + 0.1 * ours)


def test_collapse_shows_in_the_spread(batch):
    assert spread([torch.ones(4, 5, 6), torch.ones(4, 2, 6)]) == 0
    features = torch.randn(8, 3, 6)
    torch.testing.assert_close(spread([features]), features.mean(1).std(0, correction=0).mean())
    jepa = make_jepa()
    healthy = jepa(batch, RNG)
    with torch.no_grad():
        jepa.target_sound_encoder.encoder.norm.weight.zero_()
    collapsed = jepa(batch, RNG)
    assert collapsed["spread_sound"] < 1e-6 < healthy["spread_sound"]
    assert collapsed["spread_video"] == healthy["spread_video"]


def test_tokens_at_the_same_time_have_the_same_time():
    positions = JointPositions(32, Grid(4, 1, 1), Grid(1, 8, 1))
    time = positions.table[:, :16]
    for slot in range(4):  # a token of the video lasts as long as two of the sound, and is between them
        similarity = torch.nn.functional.cosine_similarity(time[slot : slot + 1], time[4:])
        assert set(similarity.topk(2).indices.tolist()) == {2 * slot, 2 * slot + 1}


@pytest.mark.parametrize(
    ("changes", "setup", "message"),
    [
        ({}, {"sound": None}, "set data.format: {name: sounding_videos}"),
        ({"sound_mask": [MASK]}, {}, r"objective.sound_mask: 1 mask\(s\), but `mask` has 2"),
        ({"sound_mask": [{"max_temporal_keep": 0.1}] * 2}, {}, r"objective.sound_mask\.0\."),
        ({"spectrogram": {"hop": 0.3}}, {}, "objective.spectrogram.hop: 0.3 seconds"),
        ({"sound_encoder": {**ENCODER, "embed_dim": 32}}, {}, "width 32 is not that of the encoder, 24"),
        ({"sound_encoder": "inflated_resnet50"}, {}, "sound_encoder"),
        ({"predictor": {"embed_dim": 20, "num_heads": 2, "use_rope": False}}, {}, "multiple of 8, not 20"),
        ({"predictor": {"embed_dim": 24, "num_heads": 2, "use_rope": True}}, {}, "use_rope: false"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, setup, message):
    def build():
        options = make_options(**changes)
        objectives.build(options, make_setup(**setup))
        objectives.further_masks(options, make_setup(**setup))

    with pytest.raises(ValueError, match=message):
        build()
