"""SALT: the loss against a loop, the frozen teacher, and teachers that do not fit."""

import copy

import pytest
import torch

from tubelet import config
from tubelet.data import Batch, to_float
from tubelet.grid import ClipShape
from tubelet.masks import build_collator
from tubelet.models import ENCODERS, build_encoder, build_predictor
from tubelet.objectives import Setup, salt
from tubelet.training.objective import StepRng

CLIP = ClipShape(num_frames=4, crop_size=32, patch_size=8, tubelet_size=2)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RNG = StepRng(seed=0, step=0, first_sample=0)
MASK = {"name": "multiblock3d", "num_blocks": 1, "spatial_scale": [0.5, 0.5]}
STUDENT = {"name": "vit_tiny", "embed_dim": 24, "depth": 2, "num_heads": 2}
TEACHER = {"name": "vit_tiny", "embed_dim": 36, "depth": 1, "num_heads": 2, "drop_rate": 0.5}
PREDICTOR = {"depth": 1, "embed_dim": 16, "num_heads": 2}


def make_salt(**options):
    torch.manual_seed(0)
    encoder, teacher = build_encoder(STUDENT, CLIP), build_encoder(TEACHER, CLIP)
    predictor = build_predictor(PREDICTOR, encoder, CLIP, 2, out_dim=36)
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


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_loss_equals_a_loop_over_positions(batch, p):
    objective = make_salt(loss_exp=p)
    video = to_float(batch.clips, MEAN, STD)
    teacher = copy.deepcopy(objective.teacher).eval()
    of_masks = []
    for index in range(2):
        context, target = batch.masks_context[index], batch.masks_target[index]
        prediction = objective.predictor(objective.encoder(video, context), None, context, target, index)
        errors = []
        for b in range(3):
            features = teacher(video[b : b + 1])[0]
            for k, position in enumerate(target[b]):
                expected = (features[position] - features[position].mean()) / (
                    features[position].var(correction=0) + 1e-5
                ).sqrt()
                errors += [abs(float(x)) ** p / p for x in (prediction[b, k] - expected).detach()]
        of_masks.append(sum(errors) / len(errors))
    assert float(objective(batch, RNG)["loss"]) == pytest.approx(sum(of_masks) / 2, rel=1e-5)


def test_only_student_and_predictor_learn(batch):
    objective = make_salt(ema=0.9).train()
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


def test_noised_targets_of_the_teachers_width(batch):
    torch.manual_seed(0)
    options = make_options(predictor=PREDICTOR | {"use_mask_tokens": False})
    objective = salt.build(options, make_setup(STUDENT | {"embed_dim": 36}))
    first = objective(batch, RNG)["loss"]
    assert objective(batch, RNG)["loss"] == first
    assert objective(batch, StepRng(seed=1, step=0, first_sample=0))["loss"] != first
