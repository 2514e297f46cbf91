import copy

import pytest
import torch
import torch.nn.functional as F

from tubelet.models.jepa import JEPA, LossConfig, covariance, invariance, prediction_variance_hinge, variance_hinge
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer

SIZES = {"img_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
CONTEXT = [torch.tensor([[0, 1, 4, 9, 20], [2, 3, 5, 30, 31]]), torch.tensor([[7, 8], [16, 17]])]
TARGET = [torch.tensor([[2, 3], [0, 1]]), torch.tensor([[1, 2, 30], [3, 4, 5]])]


def make_jepa(use_mask_tokens=True, **loss):
    torch.manual_seed(0)
    encoder = VisionTransformer(**SIZES, embed_dim=24, depth=2, num_heads=2)
    predictor = VisionTransformerPredictor(
        **SIZES, embed_dim=24, predictor_embed_dim=16, depth=1, num_heads=2, use_mask_tokens=use_mask_tokens
    )
    return JEPA(encoder, predictor, LossConfig(**loss))


@pytest.fixture
def clips():
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_loss_is_the_slow_obvious_one(clips, p):
    jepa = make_jepa(loss_exp=p)
    with torch.no_grad():
        for parameter in jepa.target_encoder.parameters():  # so that it matters whose features are taken
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss = jepa(clips, CONTEXT, TARGET, seeds=[1, 2])["loss"]
    terms = []
    for index, (context, target) in enumerate(zip(CONTEXT, TARGET, strict=True)):
        prediction = jepa.predictor(jepa.encoder(clips, context), None, context, target, index)
        for b in range(2):
            for k, place in enumerate(target[b]):
                feature = F.layer_norm(jepa.target_encoder(clips)[b, place], (24,))
                terms.append((index, ((prediction[b, k] - feature).abs() ** p).mean() / p))
    expected = sum(torch.stack([t for i, t in terms if i == index]).mean() for index in (0, 1)) / 2
    torch.testing.assert_close(loss, expected)


def test_gradient_reaches_encoder_and_predictor_only(clips):
    jepa = make_jepa(std_coeff=1.0, cov_coeff=1.0, reg_coeff=1.0)
    jepa(clips, CONTEXT, TARGET, seeds=[1, 2])["loss"].backward()
    assert all(p.grad is not None for p in jepa.encoder.parameters() if p.requires_grad)
    assert all(p.grad is not None for p in jepa.predictor.parameters() if p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in jepa.target_encoder.parameters())


def test_target_is_a_moving_average():
    jepa = make_jepa()
    before = copy.deepcopy(jepa.target_encoder.state_dict())
    with torch.no_grad():
        for parameter in jepa.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    jepa.update_target(0.9)
    ours = jepa.encoder.state_dict()
    for name, average in jepa.target_encoder.state_dict().items():
        torch.testing.assert_close(average, 0.9 * before[name] + 0.1 * ours[name])
        assert average.dtype == torch.float32


def test_terms_are_computed_only_when_asked_for(clips):
    assert set(make_jepa()(clips, CONTEXT, TARGET, [1, 2])) == {"loss", "loss_jepa"}
    losses = make_jepa(std_coeff=2.0, cov_coeff=3.0, inv_coeff=4.0)(clips, CONTEXT, TARGET, [1, 2])
    expected = losses["loss_jepa"] + 2 * losses["loss_std"] + 3 * losses["loss_cov"] + 4 * losses["loss_inv"]
    torch.testing.assert_close(losses["loss"].detach(), expected)


def test_variance_and_covariance_against_loops():
    features = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 1, 5)
    hinge = sum(max(0.0, 0.5 - (features[:, d].var() + 1e-4).sqrt()) for d in range(5)) / 5
    torch.testing.assert_close(variance_hinge(features, 0.5), hinge)
    cov = torch.cov(features.T)
    off_diagonal = sum(cov[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5
    torch.testing.assert_close(covariance(features), off_diagonal)


def test_invariance_against_a_loop():
    views = [torch.randn(4, 5) for _ in range(3)]
    pairs = [((a - b) ** 2).mean() for i, a in enumerate(views) for b in views[i + 1 :]]
    torch.testing.assert_close(invariance(views), sum(pairs) / 3)


def test_v_jepas_hinge_against_a_loop():
    predictions = [torch.randn(3, 6, 4), torch.randn(3, 2, 4)]
    deviations = torch.zeros(3, 4)
    for z in predictions:
        for b in range(3):
            for d in range(4):
                deviations[b, d] += (z[b, :, d].var() + 1e-4).sqrt() / 2
    torch.testing.assert_close(prediction_variance_hinge(predictions), (1 - deviations).clamp_min(0).mean())


def test_noise_depends_on_a_clips_seed_and_nothing_else(clips):
    jepa = make_jepa(use_mask_tokens=False)
    torch.manual_seed(5)
    first = jepa(clips, CONTEXT, TARGET, seeds=[1, 2])["loss"]
    torch.manual_seed(6)
    assert jepa(clips, CONTEXT, TARGET, seeds=[1, 2])["loss"] == first
    assert jepa(clips, CONTEXT, TARGET, seeds=[1, 3])["loss"] != first
    swapped = jepa(clips.flip(0), [m.flip(0) for m in CONTEXT], [m.flip(0) for m in TARGET], seeds=[2, 1])["loss"]
    torch.testing.assert_close(swapped, first)
