"""V-JEPA 2.1 against loops over the tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from app.vjepa.options import Options as Run
from tests.objectives.test_vjepa import CONTEXT, SIZES, TARGET, make_batch
from tubelet import config
from tubelet.config import ConfigError
from tubelet.data import to_float
from tubelet.grid import Grid
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.objectives.losses.dense import distance_weights
from tubelet.objectives.vjepa import VJEPA
from tubelet.objectives.vjepa2_1 import VJEPA21, Options
from tubelet.training.objective import StepRng

GRID = Grid(2, 4, 4)
LEVELS, WIDTH = 2, 24


def make(levels=LEVELS, use_mask_tokens=True, **options):
    torch.manual_seed(0)
    encoder = VisionTransformer(**SIZES, embed_dim=WIDTH, depth=4, num_heads=2, levels=levels)
    predictor = VisionTransformerPredictor(
        **SIZES, embed_dim=WIDTH, predictor_embed_dim=16, depth=1, num_heads=2, use_mask_tokens=use_mask_tokens,
        levels=levels, predict_context=True,
    )  # fmt: skip
    objective = VJEPA21(encoder, predictor, Options(levels=levels, **options))
    with torch.no_grad():  # so that it matters whose features and which norms are taken
        for parameter in objective.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return objective


@pytest.fixture
def clips():
    return torch.randint(256, (2, 3, 4, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def rng(step=0):
    return StepRng(seed=0, step=step, first_sample=0)


def position(index):
    return index // 16, index // 4 % 4, index % 4


def slow_levels(encoder, video, mask):
    """Tokens of the levels, block by block: [B, K, D] each."""
    x = encoder.positions.add(encoder.patch_embed(video, mask), mask)
    tokens = []
    for number, block in enumerate(encoder.blocks):
        x = block(x)
        tokens.append(x)
        if number == len(encoder.blocks) - 1:
            tokens[-1] = encoder.norm(x)
        elif number in encoder.levels:
            tokens[-1] = encoder.level_norms[encoder.levels.index(number)](x)
    return [tokens[level] for level in encoder.levels]


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("weighting", [True, False])
def test_loss_against_loops_over_tokens_and_levels(clips, p, weighting):
    jepa = make(loss_exp=p, distance_weighting=weighting, context_ramp=(10, 20), context_coeff=0.4)
    losses = jepa(make_batch(clips), rng(step=15))  # half of the ramp
    video = to_float(clips, jepa.mean, jepa.std)
    targets = slow_levels(jepa.target_encoder, video, None)

    def error(predicted, b, token):
        """Of one token: mean over its levels and channels."""
        terms = []
        for level, features in enumerate(targets):
            wanted = features[b, token]
            wanted = (wanted - wanted.mean()) / (wanted.var(unbiased=False) + 1e-5).sqrt()
            terms.append((predicted[level * WIDTH : (level + 1) * WIDTH] - wanted).abs() ** p)
        return torch.cat(terms).mean() / p

    hidden_errors, visible_errors = [], []
    for index, (context, target) in enumerate(zip(CONTEXT, TARGET, strict=True)):
        tokens = torch.cat(slow_levels(jepa.encoder, video, context), dim=-1)
        hidden, visible = jepa.predictor(tokens, None, context, target, index, return_context=True)
        of_hidden, of_visible = [], []
        for b in range(2):
            for k, token in enumerate(target[b].tolist()):
                of_hidden.append(error(hidden[b, k], b, token))
            for k, token in enumerate(context[b].tolist()):
                distance = min(math.dist(position(token), position(other)) for other in target[b].tolist())
                of_visible.append(error(visible[b, k], b, token) * (distance**-0.5 if weighting else 1))
        hidden_errors.append(sum(of_hidden) / len(of_hidden))
        visible_errors.append(sum(of_visible) / len(of_visible))
    jepa_loss, context_loss = sum(hidden_errors) / 2, sum(visible_errors) / 2
    torch.testing.assert_close(losses["loss_jepa"], jepa_loss.detach())
    torch.testing.assert_close(losses["loss_context"], context_loss.detach())
    torch.testing.assert_close(losses["loss"], jepa_loss + 0.5 * 0.4 * context_loss)


def test_distance_weights_of_a_mask_made_by_hand():
    """Two slots of 3 x 4 tokens; masked are the first token of slot 0 and the last of slot 1."""
    masked = torch.tensor([[0, 23]])
    squared = [  # distance to the nearer one
        0, 1, 4, 5,
        1, 2, 3, 2,
        4, 5, 2, 1,
        # slot 1
        1, 2, 5, 4,
        2, 3, 2, 1,
        5, 4, 1, 0,
    ]  # fmt: skip
    visible = torch.tensor([[i for i in range(24) if i not in (0, 23)]])
    expected = torch.tensor([[squared[i] ** -0.25 for i in visible[0]]])
    torch.testing.assert_close(distance_weights(visible, masked, Grid(2, 3, 4)), expected)


def test_weight_of_the_visible_tokens_is_a_function_of_the_step_alone(clips):
    jepa = make(context_coeff=0.5, context_ramp=(4, 8))
    expected = {0: 0, 3: 0, 4: 0, 5: 0.125, 6: 0.25, 8: 0.5, 1000: 0.5}
    for step in (1000, *expected, 0):
        assert jepa.options.context_weight(step) == pytest.approx(expected[step])
    assert make(context_ramp=None).options.context_weight(0) == 0.5
    assert [make(context_ramp=(3, 3)).options.context_weight(step) for step in (2, 3)] == [0, 0.5]
    assert jepa.on_update(5)["context_coeff"] == 0.125
    for step in (2, 7):
        losses = jepa(make_batch(clips), rng(step))
        total = losses["loss_jepa"] + jepa.options.context_weight(step) * losses["loss_context"]
        torch.testing.assert_close(losses["loss"].detach(), total)


@pytest.mark.parametrize("options", [{"context_ramp": None}, {"context_ramp": (5, 10)}, {"use_mask_tokens": False}])
def test_every_trained_parameter_has_a_gradient_from_the_first_step(clips, options):
    jepa = make(**options, std_coeff=1.0)
    jepa(make_batch(clips), rng(0))["loss"].backward()
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor}
    missing = [f"{k}.{n}" for k, part in parts.items() for n, p in part.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad is None for p in jepa.target_encoder.parameters())


def test_terms_on_mean_features_read_the_last_level(clips):
    with_terms, plain = make(inv_coeff=2.0, context_ramp=None), make(context_ramp=None)
    losses, expected = (jepa(make_batch(clips), rng()) for jepa in (with_terms, plain))
    video = to_float(clips, plain.mean, plain.std)
    a, b = (plain.encoder(video, mask).mean(1) for mask in CONTEXT)
    torch.testing.assert_close(losses["loss_inv"], (a - b).square().mean().detach())
    torch.testing.assert_close(losses["loss"], expected["loss"] + 2 * (a - b).square().mean())


def test_one_level_without_the_visible_tokens_is_vjepa(clips):
    dense = make(levels=1, context_coeff=0.0)
    expected = VJEPA(dense.encoder, dense.predictor, Options())
    expected.target_encoder.load_state_dict(dense.target_encoder.state_dict())
    found, wanted = (jepa(make_batch(clips), rng(0))["loss"] for jepa in (dense, expected))
    assert torch.equal(found, wanted)


def test_targets_are_normed_level_by_level(clips):
    jepa = make()
    features = jepa.target_features(to_float(clips, jepa.mean, jepa.std)).unflatten(-1, (LEVELS, WIDTH))
    torch.testing.assert_close(features, F.layer_norm(features, (WIDTH,)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["encoder.levels=1"], "encoder.levels: the objective reads 4 level"),
        (["encoder=timesformer_tiny"], "encoder.name: timesformer_tiny returns the tokens of its last block only"),
        (["objective.name=vjepa"], "encoder.levels: the objective reads 1 level"),
        (["objective.context_ramp=[3, 1]"], "objective.context_ramp: expected steps 0 <= first <= last"),
        (["encoder.levels=[0, 1, 2]"], r"levels \[0, 1, 2\]: expected ascending blocks from 0, and 3, the last"),
        (["encoder.levels=9"], "levels 9: expected 1 to 4"),
    ],
)
def test_misfits_are_refused_with_the_key(change, message):
    with pytest.raises(ConfigError, match=message):
        config.load("configs/pretrain/vjepa2_1_demo.yaml", change, Run)


def test_one_level_is_possible_with_every_encoder():
    changes = ["encoder={name: timesformer_tiny, embed_dim: 48, depth: 2, num_heads: 4}", "objective.levels=1"]
    assert config.load("configs/pretrain/vjepa2_1_demo.yaml", changes, Run).objective.levels == 1


@pytest.mark.parametrize("name", ["vjepa2_1_vitl16", "vjepa2_1_demo"])
def test_configurations_load(name):
    run = config.load(f"configs/pretrain/{name}.yaml", [], Run)
    assert (run.objective.name, run.objective.levels, run.encoder.levels) == ("vjepa2_1", 4, 4)
