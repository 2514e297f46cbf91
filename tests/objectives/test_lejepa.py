"""Masked latent prediction with SIGReg against a loop over clips and tokens."""

import pytest
import torch
from torch.nn.functional import gelu

from tubelet.data import Batch, to_float
from tubelet.grid import ClipShape
from tubelet.masks import build_collator
from tubelet.models import ENCODERS
from tubelet.objectives import Setup, lejepa
from tubelet.objectives.losses.sigreg import sigreg
from tubelet.training.objective import StepRng

CLIP = ClipShape(num_frames=4, crop_size=32, patch_size=8, tubelet_size=2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTEXT = [torch.tensor([[0, 1, 4, 9, 20], [2, 3, 5, 30, 31]]), torch.tensor([[7, 8], [16, 17]])]
TARGET = [torch.tensor([[2, 3], [0, 1]]), torch.tensor([[1, 2, 30], [3, 4, 5]])]
RNG = StepRng(seed=2, step=7, first_sample=0)


def make_lejepa(predictor=(), num_masks=2, **options):
    torch.manual_seed(0)
    encoder = ENCODERS.parse({"name": "vit_tiny", "embed_dim": 24, "depth": 2, "num_heads": 2})
    masks = build_collator([{"name": "random_tube", "ratio": 0.5}] * num_masks, CLIP)
    predictor = {"depth": 1, "embed_dim": 16, "num_heads": 2, **dict(predictor)}
    sizes = {"projector_hidden_dim": 12, "projector_dim": 8}
    return lejepa.build(
        lejepa.Options(predictor=predictor, **sizes, **options), Setup(encoder, CLIP, masks, MEAN, STD, 1)
    )


@pytest.fixture
def batch():
    clips = torch.randint(256, (2, 3, 4, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    index = torch.arange(2)
    return Batch({"clip": clips}, {}, index, ("", ""), index, 0).with_masks(CONTEXT, TARGET)


def slow_projections(objective, clips):
    projector = objective.projector
    hidden = projector.fc1(torch.cat([objective.encoder(clip[None])[0] for clip in clips]))
    normalized = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    return projector.fc2(gelu(normalized)).view(2, 32, 8)


def test_loss_against_a_loop(batch):
    objective = make_lejepa(sigreg_tokens=3, sigreg_coeff=0.1)
    clips = to_float(batch.clips, MEAN, STD)
    projections = slow_projections(objective, clips)
    errors = []
    for index, (context, target) in enumerate(zip(CONTEXT, TARGET, strict=True)):
        of_mask = []
        for b in range(2):
            tokens = objective.encoder(clips[b : b + 1], context[b : b + 1])
            predicted = objective.predictor(tokens, None, context[b : b + 1], target[b : b + 1], index)[0]
            of_mask += [((predicted[k] - projections[b, j]) ** 2).mean() for k, j in enumerate(target[b])]
        errors.append(sum(of_mask) / len(of_mask))
    positions = objective.positions(projections, RNG)
    assert len(set(positions.tolist())) == 3
    gauss = sum(sigreg(projections[:, position], RNG, objective.options.sigreg) for position in positions) / 3
    losses = objective(batch, RNG)
    torch.testing.assert_close(losses["loss_pred"], sum(errors) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_sigreg"], gauss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"], losses["loss_pred"] + 0.1 * losses["loss_sigreg"])


def test_invariance_of_the_masks_against_a_loop(batch):
    objective = make_lejepa(sigreg_coeff=0.1, inv_coeff=0.5)
    clips, projector = to_float(batch.clips, MEAN, STD), objective.clip_projector
    means = [objective.encoder(clips[b : b + 1], m[b : b + 1])[0].mean(0) for m in CONTEXT for b in range(2)]
    hidden = torch.stack([projector.fc1(mean) for mean in means])
    normalized = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    first, second = projector.fc2(gelu(normalized)).split(2)
    center = (first + second) / 2
    inv = (((first - center) ** 2).mean() + ((second - center) ** 2).mean()) / 2
    gauss = sum(sigreg(view, RNG, objective.options.sigreg) for view in (first, second)) / 2
    losses = objective(batch, RNG)
    torch.testing.assert_close(losses["loss_inv"], inv, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_clip_sigreg"], gauss, rtol=1e-4, atol=1e-6)
    expected = losses["loss_pred"] + 0.1 * losses["loss_sigreg"] + 0.5 * (inv + 0.1 * gauss)
    torch.testing.assert_close(losses["loss"], expected)


def test_prediction_moves_the_targets_unless_the_gradient_is_stopped(batch):
    for stop in (False, True):
        objective = make_lejepa(stop_gradient=stop, sigreg_coeff=0.0)
        objective(batch, RNG)["loss"].backward()
        gradient = objective.projector.fc2.weight.grad
        assert (gradient.abs().max() > 0) != stop
        assert objective.encoder.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_positions_are_those_of_the_step():
    objective, tokens = make_lejepa(), torch.zeros(1, 32, 8)
    drawn = {tuple(objective.positions(tokens, StepRng(0, step, 0)).tolist()) for step in range(30)}
    assert len(drawn) == 30
    assert torch.equal(objective.positions(tokens, RNG), objective.positions(tokens, RNG.skip(3)))


def test_noised_targets_single_clips_and_single_views_are_refused():
    with pytest.raises(ValueError, match="mask: this objective needs at least 2"):
        make_lejepa(num_masks=1, inv_coeff=1.0)
    with pytest.raises(ValueError, match="objective.predictor.use_mask_tokens"):
        make_lejepa({"use_mask_tokens": False})
    with pytest.raises(ValueError, match="raise data.batch_size"):
        lejepa.Options().check_batch(1)
