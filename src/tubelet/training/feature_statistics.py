"""Statistics of an encoder's features that show representation collapse, which the loss alone does not.

`TokenMoments.of` reduces the tokens of one batch; only its results are kept. `summarize` computes the figures from the
moments of all clips, so that the memory needed is O(clips · D + N · D) and not O(clips · N · D). All of it runs on the
device of the features, in fp32 but for the spectra (see `_spectrum`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


@dataclasses.dataclass(frozen=True)
class TokenMoments:
    """What is kept of the tokens of n clips, fp32.

    Attributes:
        clips: [n, D + 2]: the mean token of each clip; the variance over its tokens and the variance over the mean
            tokens of its time slots, both averaged over the D dimensions.
        positions: [N, D], the sum over the clips of the token at each position.
        slots: Time slots of a clip; 1 where they are not known.
    """

    clips: Tensor
    positions: Tensor
    slots: int = 1

    @classmethod
    def of(cls, tokens: Tensor, slots: int = 1, count: int | None = None) -> TokenMoments:
        """Reduce the tokens of a batch.

        Args:
            tokens: [B, N, D] in time-major order, any floating-point type.
            slots: Time slots of a clip; must divide N.
            count: Clips at the start of the batch that `positions` sums over; None for all.
        """
        tokens = tokens.float()
        mean = tokens.mean(1)
        of_slots = tokens.unflatten(1, (slots, -1)).mean(2)
        moments = [mean, _variance(tokens, mean)[:, None], _variance(of_slots, mean)[:, None]]
        return cls(torch.cat(moments, dim=1), tokens[:count].sum(0), slots)

    @classmethod
    def concatenate(cls, batches: Sequence[TokenMoments]) -> TokenMoments:
        """Return the moments of the clips of all batches."""
        positions = torch.stack([batch.positions for batch in batches]).sum(0)
        return cls(torch.cat([batch.clips for batch in batches]), positions, batches[0].slots)


def _variance(tokens: Tensor, mean: Tensor) -> Tensor:
    """Variance [B] of tokens [B, N, D] around their mean [B, D], averaged over the dimensions.

    Not as E[x²] - E[x]²: the difference of two large numbers loses a small variance.
    """
    return (tokens - mean.unsqueeze(-2)).square().mean((-2, -1))


def summarize(moments: TokenMoments, labels: Tensor) -> dict[str, float]:
    """The figures for the log; one transfer from the device.

    Args:
        moments: `TokenMoments` of all clips.
        labels: int64 [n]; -1 where a clip has none.

    Returns:
        `rank_centered` and `rank_uncentered` (see `rank_me`), `residual_variance` (see there), `spread_across`,
        `spread_within`, `spread_tokens` and, for more than one slot, `spread_time` (see `spreads`) and, where the clips
        have labels of at least two classes, `knn` in percent (see `knn_accuracy`). All of them are NaN where a feature
        is not finite.
    """
    labelled = labels >= 0
    has_classes = len(labels[labelled].unique()) > 1
    names = ["rank_centered", "rank_uncentered", "residual_variance", "spread_across", "spread_within", "spread_tokens"]
    names += ["spread_time"] * (moments.slots > 1) + ["knn"] * has_classes
    if not (moments.clips.isfinite().all() and moments.positions.isfinite().all()):
        return dict.fromkeys(names, float("nan"))
    mean_tokens = moments.clips[:, :-2]
    centered, uncentered = _spectrum(mean_tokens, center=True), _spectrum(mean_tokens, center=False)
    figures = [rank_me(centered), rank_me(uncentered), residual_variance(centered)]
    figures += spreads(moments)
    if has_classes:
        device = mean_tokens.device
        figures.append(knn_accuracy(mean_tokens[labelled.to(device)], labels[labelled].to(device)))
    return dict(zip(names, torch.stack([figure.double() for figure in figures]).tolist(), strict=True))


def _spectrum(features: Tensor, *, center: bool) -> Tensor:
    """Squared singular values of `features` [n, D], from the smaller Gram matrix.

    In fp64, as the small ones of a collapsed encoder would drown in the rounding errors of the largest. The matrix is
    small, and its eigenvalues take less time than a singular value decomposition in fp32.
    """
    features = features.double()
    if center:
        features = features - features.mean(0)
    gram = features @ features.T if features.shape[0] < features.shape[1] else features.T @ features
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def rank_me(squared_singular_values: Tensor) -> Tensor:
    """Effective rank: exp of the entropy of the normalized singular values (RankMe, Garrido et al. 2023, eq. 1).

    Centered features can keep a high rank when only small noise around one vector is left; the uncentered rank then
    falls towards 1. So both are worth logging.
    """
    singular_values = squared_singular_values.sqrt()
    p = singular_values / singular_values.sum().clamp_min(1e-12)
    return torch.exp(-torch.special.xlogy(p, p).sum())


def residual_variance(variances: Tensor, components: int = 2) -> Tensor:
    """Fraction of the variance that the first principal components do not explain.

    Args:
        variances: Variances along the principal components, in ascending order.
        components: Number of components.

    RankMe stays high while a few directions take over, as it counts many small singular values; this falls early.
    """
    return variances[:-components].sum() / variances.sum().clamp_min(1e-300)


def spreads(moments: TokenMoments) -> list[Tensor]:
    """Standard deviations of the features, relative to the RMS of the tokens; 0 where all tokens are the same vector.

    Returns:
        Of mean tokens across clips; of tokens within a clip; the same without what all clips have in common at a
        position, such as a position embedding; and, for more than one slot, of the mean tokens of the time slots
        within a clip, also without what all clips have in common.
    """
    mean_tokens, within, over_slots = moments.clips[:, :-2], moments.clips[:, -2].mean(), moments.clips[:, -1].mean()
    energy = mean_tokens.square().mean() + within
    common = moments.positions / len(mean_tokens)
    center = common.mean(0)
    # The mean over the clips of the variance within a clip is the variance of what they have in common, and the rest.
    variances = [mean_tokens.var(dim=0, unbiased=False).mean(), within, within - _variance(common, center)]
    if moments.slots > 1:
        variances.append(over_slots - _variance(common.unflatten(0, (moments.slots, -1)).mean(1), center))
    return [(variance.clamp_min(0) / energy.clamp_min(1e-24)).sqrt() for variance in variances]


def knn_accuracy(features: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Leave-one-out accuracy, in percent, of a vote of the k nearest neighbors.

    Neighbors by the cosine similarity of the centered `features` [n, D].
    """
    unit = normalize(features - features.mean(0), dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-torch.inf)
    nearest = labels[similarity.topk(min(k, len(labels) - 1), dim=1).indices]
    votes = one_hot(nearest).sum(1)
    return 100 * (votes.argmax(1) == labels).float().mean()
