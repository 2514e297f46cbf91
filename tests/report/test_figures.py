import numpy as np
import pytest
from sklearn.decomposition import PCA

from tubelet.masks.multiblock3d import MaskCollator
from tubelet.report import figures

GRID = (4, 3, 5)


def test_every_pixel_is_shaded_by_its_own_token():
    patch, tubelet = 8, 2
    shape = {"crop_size": (24, 40), "num_frames": 8, "patch_size": patch, "tubelet_size": tubelet}
    masks = MaskCollator([{"spatial_scale": (0.4, 0.4), "num_blocks": 1, "max_keep": 20}], **shape)
    contexts, targets = masks.sample_masks(2, np.random.default_rng(1))
    frames = np.random.default_rng(0).integers(0, 256, (4, 24, 40, 3), dtype=np.uint8)
    for context, target in zip(contexts[0].numpy(), targets[0].numpy(), strict=True):
        drawn = figures.shade(frames, figures.token_roles(context, target, GRID))
        kinds = set()
        for slot, y, x in np.ndindex(4, 24, 40):
            token = (slot * 3 + y // patch) * 5 + x // patch
            pixel = frames[slot, y, x].astype(float)
            if token in context:
                expected = pixel
            elif token in target:
                expected = 0.28 * pixel + 0.72 * np.array([255, 122, 26])
            else:
                expected = 0.25 * pixel
            kinds.add((token in context, token in target))
            assert np.abs(drawn[slot, y, x] - expected).max() <= 0.5 + 1e-9
        assert len(kinds) == 3


def test_principal_components_are_those_of_scikit_learn():
    tokens = np.random.default_rng(0).normal(size=(2, 4, 3, 5, 7)) * np.arange(1, 8)
    ours = figures.principal_components(tokens).reshape(-1, 3)
    theirs = PCA(3, svd_solver="full").fit_transform(tokens.reshape(-1, 7))
    signs = np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours, theirs * signs, atol=1e-9)


def test_principal_components_have_one_sign_whatever_the_order_of_the_tokens():
    tokens = np.random.default_rng(0).normal(size=(60, 7)) * np.arange(1, 8)
    forwards, backwards = figures.principal_components(tokens), figures.principal_components(tokens[::-1])
    np.testing.assert_allclose(forwards, backwards[::-1], atol=1e-9)


def test_colours_span_the_range_and_keep_the_order():
    components = np.random.default_rng(0).normal(size=(300, 3)) * [1, 10, 100]
    colours = figures.as_colours(components)
    assert colours.dtype == np.uint8
    for channel in range(3):
        order = np.argsort(components[:, channel])
        assert (np.diff(colours[order, channel].astype(int)) >= 0).all()
        assert (colours[order[0], channel], colours[order[-1], channel]) == (0, 255)


def test_colours_of_constant_features_are_flat():
    assert np.unique(figures.as_colours(np.ones((5, 3)))).tolist() == [0]


def test_colours_over_frames_stand_at_their_token():
    colours = np.zeros((1, 2, 2, 3), np.uint8)
    colours[0, 1, 0] = 255
    laid = figures.over_frames(colours, np.zeros((1, 32, 32, 3), np.uint8), weight=1.0)
    assert laid.shape == (1, 32, 32, 3)
    assert laid[0, 28, 3].min() > 200
    assert laid[0, 3, 28].max() < 50


def test_thinned_keeps_the_mean_and_the_order():
    steps, values = np.arange(1000.0), np.random.default_rng(0).normal(size=1000)
    x, y = figures.thinned(steps, values, most=100)
    assert len(x) == 100
    assert y.mean() == pytest.approx(values.mean())
    np.testing.assert_allclose(y[3], values[30:40].mean())
    assert (np.diff(x) > 0).all()


def test_curves_leave_out_what_the_log_lacks_and_what_is_not_finite():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0, "loss_jepa": 0.5}]
    loss, rank = figures.CURVES[:2]
    axes = figures.draw_curves(log, loss).axes[0]
    shown = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert shown == {"total": [[1, 2], [3, 1]], "prediction": [[3, 0.5]]}
    assert figures.draw_curves(log, rank) is None


def test_filmstrip_shows_each_frame_in_its_place():
    frames = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (10, 90, 200)])
    picture = np.asarray(figures.filmstrip({"clip": frames, "again": frames[::-1]}))
    rows = [picture[picture.shape[0] // 4], picture[3 * picture.shape[0] // 4]]
    seen = [[v for v in dict.fromkeys(row[100:, 0].tolist()) if v in (10, 90, 200)] for row in rows]
    assert seen == [[10, 90, 200], [200, 90, 10]]
