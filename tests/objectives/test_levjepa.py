"""LeVJEPA against a loop over views and clips, and what its options refuse."""

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu

from tubelet.config.registry import PartOptions
from tubelet.data import Batch, ViewOptions, to_float
from tubelet.grid import ClipShape, Grid
from tubelet.models import ENCODERS
from tubelet.objectives import Setup, levjepa
from tubelet.objectives.losses.sigreg import sigreg
from tubelet.training.objective import StepRng

CLIP = ClipShape(num_frames=4, crop_size=32, patch_size=8, tubelet_size=2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RNG = StepRng(seed=2, step=7, first_sample=6)
VIEWS = {"small": ViewOptions(count=3, crop_size=16), "global": ViewOptions(count=2)}
OPTIONS = {"projector_hidden_dim": 12, "projector_dim": 8, "token_drop": {"global": 0.5, "small": 0.0}}


def make_levjepa(encoder=(), **options):
    torch.manual_seed(0)
    encoder = ENCODERS.parse({"name": "vit_tiny", "embed_dim": 24, "depth": 2, "num_heads": 2, **dict(encoder)})
    setup = Setup(encoder, CLIP, None, MEAN, STD, schedule_steps=1)
    return levjepa.build(levjepa.Options(**{"views": VIEWS, **OPTIONS, **options}), setup)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    views = {
        "small": torch.randint(256, (9, 3, 4, 16, 16), generator=generator, dtype=torch.uint8),
        "global": torch.randint(256, (6, 3, 4, 32, 32), generator=generator, dtype=torch.uint8),
    }
    index = torch.arange(3)
    return Batch(views, {}, index, ("",) * 3, index, 7)


def project(projector, rows):
    """The projector with batch statistics written out: a list of features [D] to a list of projections."""
    hidden = np.stack([projector.fc1(row).detach().numpy() for row in rows]).astype(np.float64)
    normalized = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    return [projector.fc2(gelu(torch.from_numpy(row).float())).detach() for row in normalized]


def slow_terms(objective, batch):
    """Terms of the loss from the tokens of one crop at a time."""
    options = objective.options
    means = {}  # (view, crop, clip) -> mean token of each slot
    for name in ("global", "small"):
        count = options.views[name].count
        for clip in range(3):
            for crop in range(count):
                row = clip * count + crop
                video = to_float(batch.views[name][row : row + 1], MEAN, STD)
                tokens = objective.encoder(video)[0] if options.token_drop[name] == 0 else None
                if tokens is None:
                    seed = RNG.clip_seeds(batch, f"token drop {name}", name)[row]
                    keep = levjepa.kept_tokens([seed], Grid(2, 4, 4), 0.5, options.by_slot, video.device)
                    tokens = objective.encoder(video, keep)[0]
                slots = tokens.split(len(tokens) // 2) if options.by_slot else [tokens]
                means[name, crop, clip] = [slot.mean(0) for slot in slots]
    crops = [(name, crop) for name, count in (("global", 2), ("small", 3)) for crop in range(count)]
    keys = [(*crop, clip) for crop in crops for clip in range(3)]
    join = torch.cat if options.projector_input == "slots" else lambda slots: torch.stack(slots).mean(0)
    z = dict(zip(keys, project(objective.projector, [join(means[key]) for key in keys]), strict=True))
    distances = [
        ((z[name, crop, clip] - (z["global", 0, clip] + z["global", 1, clip]) / 2) ** 2).mean()
        for name, crop, clip in keys
    ]
    gauss = [sigreg(torch.stack([z[(*crop, clip)] for clip in range(3)]), RNG, options.sigreg) for crop in crops]
    terms = {"loss_inv": sum(distances) / len(distances), "loss_sigreg": sum(gauss) / len(gauss)}
    if options.slot_coeff:
        flat = project(objective.slot_projector, [slot for key in keys for slot in means[key]])
        following = {key: flat[2 * i : 2 * i + 2] for i, key in enumerate(keys)}
        predicted = dict(zip(keys, project(objective.slot_predictor, [means[key][0] for key in keys]), strict=True))
        terms["loss_slot"] = sum(((predicted[key] - following[key][1]) ** 2).mean() for key in keys) / len(keys)
        gauss = [
            sigreg(torch.stack([following[(*crop, clip)][slot] for clip in range(3)]), RNG, options.sigreg)
            for crop in crops
            for slot in range(2)
        ]
        terms["loss_slot_sigreg"] = sum(gauss) / len(gauss)
    return terms


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ({}, {}),
        ({"use_rope": True}, {"projector_input": "slots"}),
        ({"block_causal": True}, {"slot_coeff": 0.5}),
        ({"block_causal": True}, {"slot_coeff": 0.5, "projector_input": "slots"}),
    ],
)
def test_loss_against_a_loop(batch, encoder, options):
    objective = make_levjepa(encoder, **options)
    losses = objective(batch, RNG)
    expected = slow_terms(objective, batch)
    assert losses.keys() == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)
    total = expected["loss_inv"] + 0.02 * expected["loss_sigreg"]
    if "loss_slot" in expected:
        total += 0.5 * (expected["loss_slot"] + 0.02 * expected["loss_slot_sigreg"])
    torch.testing.assert_close(losses["loss"], total, rtol=1e-4, atol=1e-6)
    losses["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())


def test_gradients_reach_both_sides(batch):
    """Without SIGReg, moving the global crops changes the loss as much as moving the others does."""
    objective = make_levjepa(token_drop=0.0, sigreg_coeff=0.0)
    features = {}

    def keep(_, inputs):
        inputs[0].retain_grad()
        features["all"] = inputs[0]

    objective.projector.register_forward_pre_hook(keep)
    objective(batch, RNG)["loss"].backward()
    assert (features["all"].grad.abs().amax(dim=(1, 2)) > 0).all()  # of each of the five views


def test_half_precision_is_near_to_single(batch):
    objective = make_levjepa({"block_causal": True}, slot_coeff=0.5)
    expected = objective(batch, RNG)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(batch, RNG)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=5e-2, atol=1e-2)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize(("by_slot", "count"), [(False, 13), (True, 12)])
def test_kept_tokens(by_slot, count):
    grid = Grid(3, 3, 7)
    kept = levjepa.kept_tokens(range(500), grid, 0.8, by_slot, torch.device("cpu"))
    assert kept.shape == (500, count)
    assert (kept.diff(dim=1) > 0).all()
    slots = torch.stack([(kept // 21 == slot).sum(1) for slot in range(3)], dim=1)
    assert (slots == 4).all() == by_slot
    frequency = torch.bincount(kept.flatten(), minlength=63) / 500
    assert frequency.shape == (63,)
    assert (frequency - count / 63).abs().max() < 0.08
    assert torch.equal(levjepa.kept_tokens([17], grid, 0.8, by_slot, kept.device)[0], kept[17])
    assert levjepa.kept_tokens([1], Grid(2, 1, 1), 0.9, by_slot, kept.device).numel() == (2 if by_slot else 1)


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        ({}, {"views": {"global": ViewOptions(count=2, crop_size=20)}}, "objective.views.global: crop_size 20 is not"),
        ({}, {"views": {"global": ViewOptions(count=2, num_frames=8)}}, "objective.views.global: num_frames 8 exceeds"),
        ({}, {"token_drop": {"global": 0.5}}, "objective.token_drop: .*one for each of small, global"),
        ({}, {"slot_coeff": 1.0}, "encoder.block_causal: true"),
        (
            {},
            {"projector_input": "slots", "views": {**VIEWS, "small": ViewOptions(num_frames=2)}},
            "same num_frames in all views",
        ),
        ({"name": "r3d_18"}, {}, "cannot encode a part"),
    ],
)
def test_parts_that_do_not_fit_are_refused(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        make_levjepa(encoder, **options) if "name" not in encoder else levjepa.build(
            levjepa.Options(**OPTIONS, views=VIEWS),
            Setup(ENCODERS.parse(PartOptions(**encoder).model_dump()), ClipShape(4, 32), None, MEAN, STD, 1),
        )


def test_options_without_two_crops_or_two_clips_are_refused():
    for views in ({"local": ViewOptions(count=2)}, {"global": ViewOptions(count=1)}, {"global": ViewOptions(count=0)}):
        with pytest.raises(ValueError, match="crops of a clip are needed|with the name 'global'"):
            levjepa.Options(views=views)
    with pytest.raises(ValueError, match="raise data.batch_size, or lower optimization.accumulation_steps"):
        levjepa.Options().check_batch(1)
    levjepa.Options().check_batch(2)
