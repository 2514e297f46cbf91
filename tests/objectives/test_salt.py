"""SALT: the loss against a loop, the frozen teacher, the distillation of V-JEPA 2.1, and teachers that do not fit."""

import copy
import math

import pytest
import torch

from app.vjepa.options import Options as Run
from tubelet import config
from tubelet.data import Batch, to_float
from tubelet.grid import ClipShape
from tubelet.masks import build_collator
from tubelet.models import ENCODERS, build_encoder, build_predictor
from tubelet.objectives import Setup, salt
from tubelet.objectives.losses.hidden_features import prediction_error
from tubelet.training.objective import StepRng

CLIP = ClipShape(num_frames=4, crop_size=32, patch_size=8, tubelet_size=2)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RNG = StepRng(seed=0, step=0, first_sample=0)
MASK = {"name": "multiblock3d", "num_blocks": 1, "spatial_scale": [0.5, 0.5]}
STUDENT = {"name": "vit_tiny", "embed_dim": 24, "depth": 2, "num_heads": 2}
TEACHER = {"name": "vit_tiny", "embed_dim": 36, "depth": 1, "num_heads": 2, "drop_rate": 0.5}
PREDICTOR = {"depth": 1, "embed_dim": 16, "num_heads": 2}


DENSE = {"context_coeff": 0.4, "context_ramp": [10, 20]}


def make_salt(predict_context=False, **options):
    torch.manual_seed(0)
    encoder, teacher = build_encoder(STUDENT, CLIP), build_encoder(TEACHER, CLIP)
    predictor = build_predictor(PREDICTOR, encoder, CLIP, 2, out_dim=36, predict_context=predict_context)
    return salt.SALT(encoder, predictor, teacher, make_options(**options), mean=MEAN, std=STD)


def make_options(teacher=None, **options):
    random = {"checkpoint": "random", "encoder": TEACHER, "patch_size": 8, "tubelet_size": 2}
    raw = {"teacher": teacher or random, "predictor": PREDICTOR, **options}
    return config.check_part(raw, salt.Options, "objective")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    clips = torch.randint(256, (3, 3, 4, 32, 32), generator=generator, dtype=torch.uint8)
    order = torch.stack([torch.randperm(32, generator=generator) for _ in range(3)])
    index = torch.arange(3)
    plain = Batch({"clip": clips}, {"label": index}, index, ("",) * 3, index, 0)
    return plain.with_masks([order[:, :5], order[:, :12]], [order[:, 5:25], order[:, 20:]])


def slow_errors(prediction, positions, features, p):
    """Mean of |prediction - target|^p / p over the channels, for the tokens [K] of one clip."""
    errors = []
    for predicted, position in zip(prediction.tolist(), positions.tolist(), strict=True):
        target = features[position].tolist()
        mean = sum(target) / len(target)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in target) / len(target) + 1e-5)
        terms = [abs(z - (x - mean) / deviation) ** p / p for z, x in zip(predicted, target, strict=True)]
        errors.append(sum(terms) / len(terms))
    return errors


def mean_over_masks(values):
    return sum(sum(of_mask) / len(of_mask) for of_mask in values) / len(values)


@torch.no_grad()
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_loss_equals_a_loop_over_positions(batch, p):
    objective = make_salt(loss_exp=p)
    video = to_float(batch.clips, MEAN, STD)
    teacher = copy.deepcopy(objective.teacher).eval()
    errors = []
    for index in range(2):
        context, target = batch.masks_context[index], batch.masks_target[index]
        prediction = objective.predictor(objective.encoder(video, context), None, context, target, index)
        errors.append([])
        for b in range(3):
            errors[-1] += slow_errors(prediction[b], target[b], teacher(video[b : b + 1])[0], p)
    losses = objective(batch, RNG)
    assert set(losses) == {"loss"}
    assert float(losses["loss"]) == pytest.approx(mean_over_masks(errors), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("weighting", [True, False])
def test_loss_on_visible_tokens_equals_a_loop_over_positions(batch, p, weighting):
    objective = make_salt(predict_context=True, loss_exp=p, distance_weighting=weighting, **DENSE)
    video = to_float(batch.clips, MEAN, STD)
    teacher = copy.deepcopy(objective.teacher).eval()
    hidden_errors, visible_errors = [], []
    for index in range(2):
        context, target = batch.masks_context[index], batch.masks_target[index]
        tokens = objective.encoder(video, context)
        hidden, visible = objective.predictor(tokens, None, context, target, index, return_context=True)
        hidden_errors.append([])
        visible_errors.append([])
        for b in range(3):
            features = teacher(video[b : b + 1])[0]
            hidden_errors[-1] += slow_errors(hidden[b], target[b], features, p)
            errors = slow_errors(visible[b], context[b], features, p)
            for error, token in zip(errors, context[b].tolist(), strict=True):
                distance = min(math.dist(coordinates(token), coordinates(other)) for other in target[b].tolist())
                visible_errors[-1].append(error / math.sqrt(distance) if weighting else error)
    for_hidden, for_visible = mean_over_masks(hidden_errors), mean_over_masks(visible_errors)
    for step, weight in ((10, 0), (15, 0.2), (20, 0.4)):
        losses = objective(batch, StepRng(seed=0, step=step, first_sample=0))
        assert float(losses["loss_jepa"]) == pytest.approx(for_hidden, rel=1e-5)
        assert float(losses["loss_context"]) == pytest.approx(for_visible, rel=1e-5)
        assert float(losses["loss"]) == pytest.approx(for_hidden + weight * for_visible, rel=1e-5)
        assert objective.on_update(step)["context_coeff"] == pytest.approx(weight)


def coordinates(token):
    """Time, row and column in the grid 2 x 4 x 4."""
    return token // 16, token // 4 % 4, token % 4


def test_without_the_visible_tokens_the_error_of_the_hidden_ones_is_the_same_bit_for_bit(batch):
    dense = make_salt(predict_context=True, **DENSE)
    plain = make_salt(context_coeff=0.0, context_ramp=DENSE["context_ramp"])
    shared = {k: x for k, x in dense.predictor.state_dict().items() if not k.startswith("predictor_proj_context.")}
    plain.predictor.load_state_dict(shared)  # nothing is missing
    found = plain(batch, RNG)["loss"]
    assert torch.equal(found.detach(), dense(batch, RNG)["loss_jepa"])
    before = prediction_error(
        [
            plain.predictor(plain.encoder(to_float(batch.clips, MEAN, STD), context), None, context, target, index)
            for index, (context, target) in enumerate(zip(batch.masks_context, batch.masks_target, strict=True))
        ],
        plain.targets(to_float(batch.clips, MEAN, STD), batch.masks_target),
        1.0,
    )
    assert torch.equal(found, before)
    assert plain.on_update(15) == {}


@pytest.mark.parametrize("options", [{}, {"predict_context": True, **DENSE}])
def test_only_student_and_predictor_learn(batch, options):
    objective = make_salt(ema=0.9, **options).train()
    assert not objective.teacher.training
    assert objective.encoder.training
    before = copy.deepcopy(objective.teacher.state_dict())
    trained = [p for part in objective.trained_parts().values() for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    assert set(objective.trained_parts()) == {"encoder", "predictor"}
    for _ in range(2):
        objective(batch, RNG)["loss"].backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in objective.teacher.state_dict().items())
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert "teacher" not in objective.parts()


def test_the_average_of_the_students_weights_is_offered_first(batch):
    assert list(make_salt().encoders()) == ["encoder"]
    objective = make_salt(ema=0.75)
    assert list(objective.encoders()) == ["ema_encoder", "encoder"]
    name, weight = next(iter(objective.encoder.named_parameters()))
    expected = start = weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            weight.copy_(start + step + 1)
        objective.on_update(step)
        expected = 0.75 * expected + 0.25 * (start + step + 1)
    torch.testing.assert_close(dict(objective.ema_encoder.named_parameters())[name].data, expected)


def make_setup(encoder=STUDENT, clip=CLIP, mean=MEAN):
    return Setup(ENCODERS.parse(encoder), clip, build_collator([MASK, MASK], clip), mean, STD, 1)


def test_the_initial_student_does_not_depend_on_the_teacher():
    states = []
    for depth in (1, 3):
        torch.manual_seed(0)
        teacher = {"checkpoint": "random", "encoder": TEACHER | {"depth": depth}, "patch_size": 8, "tubelet_size": 2}
        objective = salt.build(make_options(teacher), make_setup())
        assert len(objective.teacher.blocks) == depth
        assert objective.predictor.predictor_proj.out_features == 36
        states.append(objective.encoder.state_dict() | objective.predictor.state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_of_a_teacher_with_several_levels_the_last_one_is_predicted(batch):
    levels = {
        "checkpoint": "random",
        "encoder": TEACHER | {"depth": 2, "levels": 2},
        "patch_size": 8,
        "tubelet_size": 2,
    }
    one = levels | {"encoder": TEACHER | {"depth": 2}}
    losses = []
    for teacher in (levels, one):
        torch.manual_seed(0)
        objective = salt.build(make_options(teacher, **DENSE), make_setup())
        heads = objective.predictor.predictor_proj, objective.predictor.predictor_proj_context
        assert [head.out_features for head in heads] == [36, 36]
        with torch.no_grad():
            losses.append(objective(batch, StepRng(seed=0, step=20, first_sample=0)))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"encoder\.levels: the objective reads 1 level"):
        salt.build(make_options(**DENSE), make_setup(STUDENT | {"levels": 2}))


def test_the_file_of_the_distillation_of_v_jepa_2_1():
    teacher = "{checkpoint: random, encoder: {name: vit_gigantic_xformers, use_rope: true, levels: 4}}"
    run = config.load("configs/pretrain/vjepa2_1_distill_vitb16.yaml", [f"objective.teacher={teacher}"], Run)
    with torch.device("meta"):
        objective = salt.build(run.objective, make_setup(run.encoder, run.data.clip_shape))
    assert (objective.encoder.embed_dim, len(objective.encoder.blocks), objective.teacher.embed_dim) == (768, 12, 1664)
    predictor = objective.predictor
    assert (len(predictor.predictor_blocks), predictor.predictor_embed.in_features) == (12, 768)
    assert predictor.predictor_proj.out_features == predictor.predictor_proj_context.out_features == 1664
    assert (objective.options.context_weight(30_000), objective.options.ema) == (0.5, 0.99925)


def test_options_are_checked_without_the_teachers_weights(tmp_path, monkeypatch):
    absent = make_options({"folder": str(tmp_path / "later")})
    with torch.device("meta"):  # the teacher is trained by the run before
        assert salt.build(absent, make_setup()).teacher.embed_dim == 24
    with pytest.raises(config.ConfigError, match=r"objective\.teacher\.folder: .*later does not exist"):
        salt.build(absent, make_setup())


@pytest.mark.parametrize(
    ("teacher", "predictor", "message"),
    [
        (
            {"patch_size": 16},
            {},
            r"objective\.teacher: its tokens cover 2 x 16 x 16 .* encoder 2 x 8 x 8 .*data\.patch_",
        ),
        ({"tubelet_size": 4}, {}, r"tokens cover 4 x 8 x 8 .*data\.tubelet_size"),
        ({"patch_size": 24}, {}, r"objective\.teacher: crop_size 32 is not divisible by patch_size 24"),
        ({}, {"use_mask_tokens": False}, r"use_mask_tokens: .* 36 channels \(objective\.teacher\).* 24 \(encoder\)"),
        ({}, {"num_heads": 5}, r"objective\.predictor: "),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_data_is_read(teacher, predictor, message):
    random = {"checkpoint": "random", "encoder": TEACHER, "patch_size": 8, "tubelet_size": 2}
    options = make_options(random | teacher, predictor=PREDICTOR | predictor)
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        salt.build(options, make_setup())


@pytest.mark.parametrize("dense", [{}, {"context_coeff": 0.5, "context_ramp": None}])
def test_noised_targets_of_the_teachers_width(batch, dense):
    torch.manual_seed(0)
    options = make_options(predictor=PREDICTOR | {"use_mask_tokens": False}, **dense)
    objective = salt.build(options, make_setup(STUDENT | {"embed_dim": 36}))
    first = objective(batch, RNG)["loss"]
    assert objective(batch, RNG)["loss"] == first
    assert objective(batch, StepRng(seed=1, step=0, first_sample=0))["loss"] != first
