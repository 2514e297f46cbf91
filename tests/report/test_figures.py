import dataclasses

import numpy as np
import pytest
from sklearn.decomposition import PCA

from tubelet.masks.multiblock3d import MaskCollator
from tubelet.objectives.vjepa import CURVES
from tubelet.report import figures
from tubelet.report.curves import GENERAL, figures_of, loss_curves

GRID = (4, 3, 5)


def test_pixels_are_shaded_by_the_role_of_their_token():
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


def test_sign_of_principal_components_does_not_depend_on_the_order_of_tokens():
    tokens = np.random.default_rng(0).normal(size=(60, 7)) * np.arange(1, 8)
    forwards, backwards = figures.principal_components(tokens), figures.principal_components(tokens[::-1])
    np.testing.assert_allclose(forwards, backwards[::-1], atol=1e-9)


def test_colors_span_the_range_and_keep_the_order():
    components = np.random.default_rng(0).normal(size=(300, 3)) * [1, 10, 100]
    colors = figures.as_colors(components)
    assert colors.dtype == np.uint8
    for channel in range(3):
        order = np.argsort(components[:, channel])
        assert (np.diff(colors[order, channel].astype(int)) >= 0).all()
        assert (colors[order[0], channel], colors[order[-1], channel]) == (0, 255)


def test_colors_of_constant_features_are_flat():
    assert np.unique(figures.as_colors(np.ones((5, 3)))).tolist() == [0]


def test_overlaid_colors_are_at_the_position_of_their_token():
    colors = np.zeros((1, 2, 2, 3), np.uint8)
    colors[0, 1, 0] = 255
    blended = figures.overlay(colors, np.zeros((1, 32, 32, 3), np.uint8), weight=1.0)
    assert blended.shape == (1, 32, 32, 3)
    assert blended[0, 28, 3].min() > 200
    assert blended[0, 3, 28].max() < 50


def test_subsampling_keeps_mean_and_order():
    steps, values = np.arange(1000.0), np.random.default_rng(0).normal(size=1000)
    x, y = figures.subsample(steps, values, max_points=100)
    assert len(x) == 100
    assert y.mean() == pytest.approx(values.mean())
    np.testing.assert_allclose(y[3], values[30:40].mean())
    assert (np.diff(x) > 0).all()


def test_curves_without_missing_metrics_and_non_finite_values():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0, "loss_jepa": 0.5}]
    rank = GENERAL[0]
    axes = figures.draw_curves(log, CURVES[0]).axes[0]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {"total": [[1, 2], [3, 1]], "prediction": [[3, 0.5]]}
    assert figures.draw_curves(log, rank) is None


def test_frames_of_a_filmstrip_are_in_order():
    frames = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (10, 90, 200)])
    picture = np.asarray(figures.filmstrip({"clip": frames, "again": frames[::-1]}))
    rows = [picture[picture.shape[0] // 4], picture[3 * picture.shape[0] // 4]]
    values = [[v for v in dict.fromkeys(row[100:, 0].tolist()) if v in (10, 90, 200)] for row in rows]
    assert values == [[10, 90, 200], [200, 90, 10]]


def test_generic_loss_figure_has_every_loss_of_the_log():
    curves = loss_curves([{"step": 0, "knn": 1.0}, {"step": 1, "loss": 2.0, "loss_pixels": 1.0, "loss_kl_term": 1.0}])
    assert curves.names == {"loss": "total", "loss_pixels": "pixels", "loss_kl_term": "kl term"}


def test_more_curves_than_colors():
    names = {f"loss_{i}": str(i) for i in range(20)}
    curves = loss_curves([dict.fromkeys(names, 1.0)])
    log = [{"step": 1, **dict.fromkeys(names, 1.0)}]
    assert len(figures.draw_curves(log, curves).axes[0].lines) == 20


def test_general_figures_only_where_the_log_has_them():
    log = [{"step": 1, "loss": 1.0, "lr": 0.1, "knn": None}]
    assert [each.key for each in figures_of(CURVES, log)] == ["loss", "lr"]
    of_objective = dataclasses.replace(CURVES[0], key="lr")
    assert figures_of([of_objective], log) == [of_objective]
