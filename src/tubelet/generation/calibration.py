"""Calibration of forecasts that are ensembles of draws: does the truth look like one more draw?

Draws are [M, …], the truth has the shape of one draw. Ranks: Hamill 2001; distance as a rank: Thorarinsdottir et al.
2016; spread and error: Fortin et al. 2014; scores: Gneiting & Raftery 2007, in their form for any M (Ferro 2014).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SCORES = ("energy_score", "energy_score_clip", "crps")
"""See `forecast_scores`."""
RANKED = ("tokens", "clip", "distance")
"""What the truth is ranked by: projections of each token's features on random directions, projections of the mean
over the tokens, and the distance of each token's features to the mean of the ensemble."""
BINS = 10


def rank_of_truth(draws: Tensor, truth: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return how many of the M draws are below the truth: int64 from 0 to M, ties broken at random.

    Calibrated draws give each rank equally often.
    """
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    chance = torch.rand(truth.shape, generator=generator, device=truth.device)
    return below + (chance * (equal + 1)).long()


def rank_histogram(ranks: Tensor, num_draws: int) -> Tensor:
    """Count the ranks 0 to M, int64 [M + 1]."""
    return torch.bincount(ranks.flatten(), minlength=num_draws + 1)


def deviation(histogram: Tensor) -> float:
    """Return the total variation distance of a rank histogram from the uniform one: 0 for equal counts, below 1."""
    fractions = histogram.double() / histogram.sum()
    return float((fractions - 1 / len(fractions)).abs().sum() / 2)


def coverage(histogram: Tensor, level: float) -> tuple[float, float]:
    """Return how often the truth is among the central draws, and how often it would be if these were calibrated.

    At either end as many ranks are left out as keep the second number at or above `level`.
    """
    tail = math.floor((1 - level) / 2 * len(histogram) + 1e-9)
    inside = histogram[tail : len(histogram) - tail]
    return float(inside.sum() / histogram.sum()), len(inside) / len(histogram)


def distances_to_mean(draws: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances of the draws [M, …, D] and of the truth to the mean of all M + 1: [M, …] and […].

    The truth is one of the members that are averaged, so that its rank is uniform if it is like the draws.
    """
    members = torch.cat([draws, truth[None]])
    distances = (members - members.mean(0)).norm(dim=-1)
    return distances[:-1], distances[-1]


def spread_and_error(draws: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance of the draws and the squared error of their mean, each averaged over D: [M, …, D] -> […].

    The variance is multiplied by (M + 1) / M: then both have the same expectation if the draws are calibrated.
    """
    count = len(draws)
    variance = draws.var(0).mean(-1) * (count + 1) / count
    return variance, (draws.mean(0) - truth).square().mean(-1)


def energy_score(draws: Tensor, truth: Tensor) -> Tensor:
    """Return the energy score of draws [M, …, D]: mean |x - y| - mean |x - x'| / 2 over pairs of different draws.

    The lower the better; its expectation does not depend on M, and it is the distance to the truth for a single draw.
    With D = 1 it is the CRPS.
    """
    error = (draws - truth).norm(dim=-1).mean(0)
    if len(draws) == 1:
        return error
    members = draws.movedim(0, -2)  # […, M, D]
    pairs = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist").sum((-1, -2))
    return error - pairs / (2 * len(draws) * (len(draws) - 1))


def random_directions(dim: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` uniformly distributed unit vectors as columns [dim, count]."""
    directions = torch.randn(dim, count, generator=generator, device=generator.device)
    return directions / directions.norm(dim=0)


@dataclass
class Calibration:
    """Sums over clips of what the functions above measure.

    Args:
        num_draws: Number M of draws.
    """

    num_draws: int
    histograms: dict[str, Tensor] = field(default_factory=dict)
    variances: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, draws: Tensor, truth: Tensor, directions: Tensor, generator: torch.Generator | None = None) -> None:
        """Add a clip.

        Args:
            draws: Draws of the features of its hidden tokens [M, Kt, D].
            truth: The features [Kt, D].
            directions: Columns on which features are projected, [D, K].
            generator: Breaks ties between ranks; torch's default generator if None.
        """
        projected = draws @ directions, truth @ directions  # [M, Kt, K] and [Kt, K]
        mean = draws.mean(1) @ directions, truth.mean(0) @ directions
        for name, (x, y) in zip(RANKED, (projected, mean, distances_to_mean(draws, truth)), strict=True):
            counts = rank_histogram(rank_of_truth(x, y, generator), self.num_draws).cpu()
            self.histograms[name] = self.histograms.get(name, 0) + counts
        variance, error = spread_and_error(draws, truth)
        self.variances.append(variance.cpu())
        self.errors.append(error.cpu())
        for name, score in forecast_scores(draws, truth, directions).items():
            self.scores.setdefault(name, []).append(score)

    def merge(self, others: Iterable["Calibration"]) -> "Calibration":
        """Add what others, such as other processes, have measured on other clips."""
        for other in others:
            for name, counts in other.histograms.items():
                self.histograms[name] = self.histograms.get(name, 0) + counts
            self.variances += other.variances
            self.errors += other.errors
            for name, scores in other.scores.items():
                self.scores.setdefault(name, []).extend(scores)
        return self

    def summary(self, level: float) -> dict[str, Any]:
        """Return everything as numbers and lists for JSON.

        Args:
            level: Nominal coverage of the central draws.
        """
        variance, error = torch.cat(self.variances), torch.cat(self.errors)
        ranks = {}
        for name, histogram in self.histograms.items():
            covered, nominal = coverage(histogram, level)
            ranks[name] = {
                "histogram": histogram.tolist(),
                "deviation": deviation(histogram),
                "coverage": covered,
                "nominal_coverage": nominal,
            }
        return {
            "ranks": ranks,
            "spread": math.sqrt(variance.mean()),
            "error": math.sqrt(error.mean()),
            "spread_over_error": math.sqrt(variance.mean() / error.mean()),
            "spread_error_bins": spread_error_bins(variance, error),
            **{name: math.fsum(scores) / len(scores) for name, scores in self.scores.items()},
        }


def forecast_scores(draws: Tensor, truth: Tensor, directions: Tensor) -> dict[str, float]:
    """Score a forecast of the features of a clip's hidden tokens [M, Kt, D]; a single draw is a point forecast.

    Returns:
        `energy_score`, that of a token's features, averaged over the tokens; `energy_score_clip`, that of the features
        of all tokens together; and `crps` of the projections, averaged over tokens and directions.
    """
    projected = (draws @ directions)[..., None], (truth @ directions)[..., None]
    clip = energy_score(draws.flatten(1), truth.flatten())
    scores = energy_score(draws, truth).mean(), clip, energy_score(*projected).mean()
    return dict(zip(SCORES, map(float, scores), strict=True))


def spread_error_bins(variance: Tensor, error: Tensor, bins: int = BINS) -> list[list[float]]:
    """Sort tokens by the spread of their draws into equally large bins: [RMS spread, RMS error] of each."""
    order = variance.argsort()
    parts = zip(variance[order].tensor_split(bins), error[order].tensor_split(bins), strict=True)
    return [[math.sqrt(v.mean()), math.sqrt(e.mean())] for v, e in parts if len(v)]
