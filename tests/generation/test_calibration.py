"""Calibration measures against loops, and on Gaussian models whose calibration is known."""

import functools
import math

import pytest
import torch

from tubelet.generation import calibration_figure
from tubelet.generation.calibration import (
    BINS,
    RANKED,
    Calibration,
    coverage,
    deviation,
    distances_to_mean,
    energy_score,
    forecast_scores,
    random_directions,
    rank_histogram,
    rank_of_truth,
    spread_and_error,
    spread_error_bins,
)

M, TOKENS, DIM, CLIPS = 19, 6, 8, 400


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def ensemble():
    """Draws [5, 3, 4] and the truth [3, 4], one value of which equals two of the draws."""
    draws, truth = torch.randn(5, 3, 4, generator=generator()), torch.randn(3, 4, generator=generator(1))
    draws[1:3, 0, 0] = truth[0, 0]
    return draws, truth


def test_ranks_against_a_loop(ensemble):
    draws, truth = ensemble
    seen = set()
    for seed in range(50):
        ranks = rank_of_truth(draws, truth, generator(seed))
        for i in range(3):
            for d in range(4):
                below = sum(float(draws[m, i, d]) < float(truth[i, d]) for m in range(5))
                if (i, d) == (0, 0):
                    seen.add(int(ranks[0, 0]) - below)
                else:
                    assert ranks[i, d] == below
    assert seen == {0, 1, 2}  # the tie is broken at random
    ranks = torch.tensor([[0, 3], [3, 5]])
    assert rank_histogram(ranks, 5).tolist() == [1, 0, 0, 2, 0, 1]


def test_deviation_and_coverage_of_a_histogram():
    assert deviation(torch.tensor([3, 3, 3, 3])) == 0
    assert deviation(torch.tensor([6, 0, 0, 6])) == pytest.approx(0.5)
    assert deviation(torch.tensor([8, 0, 0, 0])) == pytest.approx(0.75)
    uneven = torch.tensor([10, *[1] * 18, 10])
    assert coverage(uneven, 0.8) == pytest.approx((16 / 38, 0.8))
    assert coverage(uneven, 0.9) == pytest.approx((18 / 38, 0.9))
    assert coverage(torch.ones(6), 0.8) == pytest.approx((1.0, 1.0))  # leaving out two ranks would cover 67 %


def test_distances_spread_and_error_against_loops(ensemble):
    draws, truth = ensemble
    of_draws, of_truth = distances_to_mean(draws, truth)
    variance, error = spread_and_error(draws, truth)
    for i in range(3):
        members = [*draws[:, i], truth[i]]
        center = sum(members) / 6
        expected = torch.stack([((member - center) ** 2).sum().sqrt() for member in members])
        torch.testing.assert_close(torch.cat([of_draws[:, i], of_truth[i : i + 1]]), expected)
        mean = sum(draws[:, i]) / 5
        spread = sum(((draw - mean) ** 2).sum() for draw in draws[:, i]) / 4 / 4
        torch.testing.assert_close(variance[i], spread * 6 / 5)
        torch.testing.assert_close(error[i], ((mean - truth[i]) ** 2).sum() / 4)


def test_energy_score_against_a_loop(ensemble):
    draws, truth = ensemble
    scores = energy_score(draws, truth)
    for i in range(3):
        near = sum(math.dist(draws[m, i].tolist(), truth[i].tolist()) for m in range(5)) / 5
        pairs = [math.dist(draws[a, i].tolist(), draws[b, i].tolist()) for a in range(5) for b in range(5) if a != b]
        assert float(scores[i]) == pytest.approx(near - sum(pairs) / 20 / 2, rel=1e-5)
    torch.testing.assert_close(energy_score(draws[:1], truth), (draws[0] - truth).norm(dim=-1))
    directions = random_directions(4, 3, generator())
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(3))
    measured = forecast_scores(draws, truth, directions)
    assert measured["energy_score"] == pytest.approx(float(scores.mean()))
    assert measured["energy_score_clip"] == pytest.approx(float(energy_score(draws.flatten(1), truth.flatten())))
    crps = [
        float(energy_score((draws[:, i] @ directions[:, k])[:, None], (truth[i] @ directions[:, k])[None]))
        for i in range(3)
        for k in range(3)
    ]
    assert measured["crps"] == pytest.approx(sum(crps) / 9, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_crps_of_a_gaussian_is_the_known_one_for_any_number_of_draws(scale):
    truth = torch.randn(20000, 1, generator=generator(), dtype=torch.float64)
    expected = (math.sqrt(1 + scale**2) * math.sqrt(2) - scale) / math.sqrt(math.pi)  # Gneiting & Raftery 2007, (21)
    for count in (2, 30):
        draws = scale * torch.randn(count, 20000, 1, generator=generator(1), dtype=torch.float64)
        assert float(energy_score(draws, truth).mean()) == pytest.approx(expected, rel=0.02)


@functools.cache
def gaussian(spread, seed=0):
    """Calibration of draws whose standard deviation is `spread` times that of the truth, around the right mean.

    The standard deviations of tokens differ, so that the spread tells the error of a token.
    """
    g = generator(seed)
    calibration, directions = Calibration(M), random_directions(DIM, 4, g)
    for _ in range(CLIPS):
        mean, deviations = torch.randn(TOKENS, DIM, generator=g), torch.rand(TOKENS, 1, generator=g) + 0.2
        draws = mean + spread * deviations * torch.randn(M, TOKENS, DIM, generator=g)
        calibration.add(draws, mean + deviations * torch.randn(TOKENS, DIM, generator=g), directions, g)
    return calibration


def normal_between(limit):
    return math.erf(limit / math.sqrt(2))


def test_draws_from_the_distribution_of_the_truth_are_calibrated():
    measured = gaussian(1.0).summary(0.8)
    assert set(measured["ranks"]) == set(RANKED)
    for ranks in measured["ranks"].values():
        assert sum(ranks["histogram"]) in (CLIPS * TOKENS * 4, CLIPS * 4, CLIPS * TOKENS)
        assert ranks["deviation"] < 0.06
        assert ranks["nominal_coverage"] == pytest.approx(0.8)
        assert ranks["coverage"] == pytest.approx(0.8, abs=0.03)
    assert measured["spread_over_error"] == pytest.approx(1.0, abs=0.02)
    bins = measured["spread_error_bins"]
    assert len(bins) == BINS
    assert all(error == pytest.approx(spread, rel=0.1) for spread, error in bins)
    assert bins[-1][0] > 3 * bins[0][0]


def test_over_and_underconfident_draws_are_told_apart():
    confident, calibrated, vague = (gaussian(spread).summary(0.8) for spread in (0.5, 1.0, 2.0))
    # The mean of the draws has a variance of 1 / M of theirs, which the error contains.
    assert confident["spread_over_error"] == pytest.approx(0.5 * math.sqrt(1.05 / (1 + 0.25 / M)), abs=0.02)
    assert vague["spread_over_error"] == pytest.approx(2.0 * math.sqrt(1.05 / (1 + 4 / M)), abs=0.08)
    tokens = [m["ranks"]["tokens"] for m in (confident, calibrated, vague)]
    assert tokens[0]["histogram"][0] + tokens[0]["histogram"][-1] > 4 * sum(tokens[0]["histogram"]) / (M + 1)
    assert tokens[2]["histogram"][0] + tokens[2]["histogram"][-1] < 0.5 * sum(tokens[2]["histogram"]) / (M + 1)
    # Central 80 % of a normal distribution: ± 1.2816 standard deviations of the draws.
    assert tokens[0]["coverage"] == pytest.approx(normal_between(1.2816 * 0.5), abs=0.04)
    assert tokens[2]["coverage"] == pytest.approx(normal_between(1.2816 * 2), abs=0.03)
    distance = [m["ranks"]["distance"]["histogram"] for m in (confident, vague)]
    assert distance[0][-1] > 10 * distance[0][0]  # the truth is further from the mean than the draws
    assert distance[1][0] > 10 * distance[1][-1]
    for name in ("energy_score", "crps"):
        assert calibrated[name] < min(confident[name], vague[name])


def test_clips_may_be_measured_by_several_processes():
    g = generator(5)
    directions = random_directions(DIM, 4, g)
    parts = [Calibration(M) for _ in range(3)]
    draws, truth = torch.randn(30, M, TOKENS, DIM, generator=g), torch.randn(30, TOKENS, DIM, generator=g)
    together = Calibration(M)
    for clip in range(30):
        for calibration in (together, parts[clip % 2]):  # the third process has no clip
            calibration.add(draws[clip], truth[clip], directions)
    merged = Calibration(M).merge(parts).summary(0.8)
    expected = together.summary(0.8)
    for name in ("spread", "error", "spread_over_error", "energy_score", "energy_score_clip", "crps"):
        assert merged[name] == pytest.approx(expected[name], rel=1e-5)
    assert merged["ranks"] == expected["ranks"]


def test_bins_are_of_equal_size_and_ordered():
    variance, error = torch.arange(1.0, 26.0), torch.ones(25)
    bins = spread_error_bins(variance, error, bins=5)
    assert [spread for spread, _ in bins] == pytest.approx([math.sqrt(3 + 5 * i) for i in range(5)])
    assert all(error == 1.0 for _, error in bins)
    assert len(spread_error_bins(variance[:3], error[:3], bins=5)) == 3


def test_figure_has_a_row_of_panels_for_each_ensemble():
    figure = calibration_figure.draw({"a": gaussian(0.5).summary(0.8), "b": gaussian(1.0).summary(0.8)})
    assert len(figure.axes) == 2 * (len(RANKED) + 1)
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes[:3]]
    assert all(sum(panel) / (M + 1) == pytest.approx(1.0) for panel in heights)
