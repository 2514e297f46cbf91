import copy

import pytest
import torch
import torch.nn.functional as F

from tubelet.data import Batch, to_float
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.objectives.losses.vicreg import covariance, invariance, variance_hinge
from tubelet.objectives.vjepa import VJEPA, Options, prediction_variance_hinge
from tubelet.training.objective import StepRng

SIZES = {"img_size": 32, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
CONTEXT = [torch.tensor([[0, 1, 4, 9, 20], [2, 3, 5, 30, 31]]), torch.tensor([[7, 8], [16, 17]])]
TARGET = [torch.tensor([[2, 3], [0, 1]]), torch.tensor([[1, 2, 30], [3, 4, 5]])]


def make_vjepa(use_mask_tokens=True, **options):
    torch.manual_seed(0)
    encoder = VisionTransformer(**SIZES, embed_dim=24, depth=2, num_heads=2)
    predictor = VisionTransformerPredictor(
        **SIZES, embed_dim=24, predictor_embed_dim=16, depth=1, num_heads=2, use_mask_tokens=use_mask_tokens
    )
    return VJEPA(encoder, predictor, Options(**options))


class FixedSeeds(StepRng):
    """A StepRng with the given seeds of the clips."""

    def __init__(self, *seeds):
        super().__init__(seed=0, step=0, first_sample=0)
        object.__setattr__(self, "seeds", seeds)

    def clip_seeds(self, batch, purpose, view="clip"):
        return list(self.seeds)


SEEDS = FixedSeeds(1, 2)


def make_batch(clips, context=CONTEXT, target=TARGET):
    index = torch.arange(2)
    return Batch({"clip": clips}, {"label": index}, index, ("", ""), index, 0).with_masks(context, target)


@pytest.fixture
def clips():
    return torch.randint(256, (2, 3, 4, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_loss_against_a_loop(clips, p):
    jepa = make_vjepa(loss_exp=p)
    with torch.no_grad():
        for parameter in jepa.target_encoder.parameters():  # so that it matters whose features are taken
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss = jepa(make_batch(clips), SEEDS)["loss"]
    video = to_float(clips, jepa.mean, jepa.std)
    terms = []
    for index, (context, target) in enumerate(zip(CONTEXT, TARGET, strict=True)):
        prediction = jepa.predictor(jepa.encoder(video, context), None, context, target, index)
        for b in range(2):
            for k, position in enumerate(target[b]):
                feature = F.layer_norm(jepa.target_encoder(video)[b, position], (24,))
                terms.append((index, ((prediction[b, k] - feature).abs() ** p).mean() / p))
    expected = sum(torch.stack([t for i, t in terms if i == index]).mean() for index in (0, 1)) / 2
    torch.testing.assert_close(loss, expected)


def test_gradient_reaches_encoder_and_predictor_only(clips):
    jepa = make_vjepa(std_coeff=1.0, cov_coeff=1.0, reg_coeff=1.0)
    jepa(make_batch(clips), SEEDS)["loss"].backward()
    assert all(p.grad is not None for p in jepa.encoder.parameters() if p.requires_grad)
    assert all(p.grad is not None for p in jepa.predictor.parameters() if p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in jepa.target_encoder.parameters())


def test_target_is_a_moving_average():
    jepa = make_vjepa(ema=(0.9, 1.0))
    before = copy.deepcopy(jepa.target_encoder.state_dict())
    with torch.no_grad():
        for parameter in jepa.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert jepa.on_update(0) == {"momentum": 0.9}
    ours = jepa.encoder.state_dict()
    for name, average in jepa.target_encoder.state_dict().items():
        torch.testing.assert_close(average, 0.9 * before[name] + 0.1 * ours[name])
        assert average.dtype == torch.float32


def test_only_terms_with_a_weight_are_computed(clips):
    assert set(make_vjepa()(make_batch(clips), SEEDS)) == {"loss", "loss_jepa"}
    losses = make_vjepa(std_coeff=2.0, cov_coeff=3.0, inv_coeff=4.0)(make_batch(clips), SEEDS)
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


def test_prediction_hinge_against_a_loop():
    predictions = [torch.randn(3, 6, 4), torch.randn(3, 2, 4)]
    deviations = torch.zeros(3, 4)
    for z in predictions:
        for b in range(3):
            for d in range(4):
                deviations[b, d] += (z[b, :, d].var() + 1e-4).sqrt() / 2
    torch.testing.assert_close(prediction_variance_hinge(predictions), (1 - deviations).clamp_min(0).mean())


def test_noise_depends_on_the_seed_of_the_clip_only(clips):
    jepa = make_vjepa(use_mask_tokens=False)
    torch.manual_seed(5)
    first = jepa(make_batch(clips), SEEDS)["loss"]
    torch.manual_seed(6)
    assert jepa(make_batch(clips), SEEDS)["loss"] == first
    assert jepa(make_batch(clips), FixedSeeds(1, 3))["loss"] != first
    flipped = make_batch(clips.flip(0), [m.flip(0) for m in CONTEXT], [m.flip(0) for m in TARGET])
    swapped = jepa(flipped, FixedSeeds(2, 1))["loss"]
    torch.testing.assert_close(swapped, first)
