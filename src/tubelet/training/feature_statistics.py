"""Statistics of an encoder's features that show representation collapse, which the loss alone does not.

`clip_statistics` reduces the tokens of one batch; only its results are kept. `summarize` computes the figures from the
results of all batches, so that the memory needed is O(clips · D) and not O(clips · N · D).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


def clip_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce the tokens of each clip.

    Args:
        tokens: [B, N, D], any floating-point type.

    Returns:
        The mean token of each clip, fp32 [B, D], and the variance over its tokens, averaged over the D dimensions,
        fp32 [B].
    """
    tokens = tokens.float()
    mean = tokens.mean(1)
    # Around the mean, not as E[x²] - E[x]²: the difference of two large numbers loses a small variance.
    return mean, (tokens - mean[:, None]).square_().mean((1, 2))


def summarize(mean_tokens: Tensor, variances: Tensor, labels: Tensor) -> dict[str, float]:
    """The figures for the log.

    Args:
        mean_tokens: [n, D], and variances: [n], the results of `clip_statistics` for all clips.
        labels: int64 [n]; -1 where a clip has none.

    Returns:
        `rank_centered` and `rank_uncentered` (see `rank_me`), `spread_within` and `spread_across` (see `feature_std`)
        and, where the clips have labels of at least two classes, `knn` in percent (see `knn_accuracy`). All of them
        are NaN where a feature is not finite.
    """
    labelled = labels >= 0
    has_classes = len(labels[labelled].unique()) > 1
    if not (mean_tokens.isfinite().all() and variances.isfinite().all()):
        names = ["rank_centered", "rank_uncentered", "spread_within", "spread_across", *["knn"] * has_classes]
        return dict.fromkeys(names, float("nan"))
    within, across = feature_std(mean_tokens, variances)
    figures = {
        "rank_centered": rank_me(mean_tokens, center=True),
        "rank_uncentered": rank_me(mean_tokens, center=False),
        "spread_within": within,
        "spread_across": across,
    }
    if has_classes:
        figures["knn"] = knn_accuracy(mean_tokens[labelled], labels[labelled])
    return figures


def rank_me(features: Tensor, *, center: bool) -> float:
    """Effective rank of `features` [n, D]: exp of the entropy of the normalized singular values.

    RankMe (Garrido et al. 2023, eq. 1). Centered features can keep a high rank when only small noise around one
    vector is left; the uncentered rank then falls towards 1. So both are worth logging.
    """
    features = features.double()
    if center:
        features = features - features.mean(0)
    singular_values = torch.linalg.svdvals(features)
    p = singular_values / singular_values.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * torch.log(p.clamp_min(1e-12))).sum()))


def feature_std(mean_tokens: Tensor, variances: Tensor) -> tuple[float, float]:
    """Standard deviation of tokens within a clip and of mean tokens across clips, relative to the tokens' RMS.

    Both are 0 where all tokens are the same vector.

    Args:
        mean_tokens: [n, D], and variances: [n], as from `clip_statistics`.
    """
    mean_tokens, variances = mean_tokens.double(), variances.double()
    rms = (mean_tokens.square().mean() + variances.mean()).sqrt().clamp_min(1e-12)
    within = variances.mean().sqrt()
    across = mean_tokens.var(dim=0, unbiased=False).mean().sqrt()
    return float(within / rms), float(across / rms)


def knn_accuracy(features: Tensor, labels: Tensor, k: int = 5) -> float:
    """Leave-one-out accuracy, in percent, of a vote of the k nearest neighbors.

    Neighbors by the cosine similarity of the centered `features` [n, D].
    """
    unit = normalize(features - features.mean(0), dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-torch.inf)
    nearest = labels[similarity.topk(min(k, len(labels) - 1), dim=1).indices]
    votes = one_hot(nearest).sum(1)
    return 100 * float((votes.argmax(1) == labels).float().mean())
