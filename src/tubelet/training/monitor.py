"""A look at an encoder's features at intervals: is it collapsing, does it learn?"""

import warnings

import torch
from torch import nn

from tubelet.data import Batch, to_float
from tubelet.training.feature_statistics import knn_accuracy, rank_me, spread


class FeatureMonitor:
    """Rank, spread and nearest neighbours of an encoder's features of the same clips each time."""

    def __init__(self, clips: Batch, batch_size: int, mean: tuple, std: tuple, device: torch.device):
        self.clips, self.labels, self.batch_size = clips.clips, clips.labels, batch_size
        self.mean, self.std, self.device = mean, std, device

    @torch.no_grad()
    def look(self, encoder: nn.Module) -> dict[str, float]:
        """Numbers for the log: `rank_centered`, `rank_uncentered`, `spread_within`, `spread_across`, and, where the
        clips have labels of two or more classes, `knn` in percent."""
        training = encoder.training
        encoder.eval()
        tokens = []
        for clips in self.clips.split(self.batch_size):
            tokens.append(encoder(to_float(clips.to(self.device), self.mean, self.std)).cpu())
        encoder.train(training)
        features = torch.cat(tokens)
        pooled = features.mean(1)
        within, across = spread(features)
        numbers = {
            "rank_centered": rank_me(pooled, center=True),
            "rank_uncentered": rank_me(pooled, center=False),
            "spread_within": within,
            "spread_across": across,
        }
        labelled = self.labels >= 0
        if len(self.labels[labelled].unique()) > 1:
            numbers["knn"] = knn_accuracy(pooled[labelled], self.labels[labelled])
        return numbers


def warn_of_collapse(now: dict[str, float], at_start: dict[str, float]) -> None:
    """Warn, and say what to do, when the clips' features are growing together."""
    if now["rank_uncentered"] < 1.5 or now["spread_across"] < 0.25 * at_start["spread_across"]:
        warnings.warn(
            f"the features are collapsing: spread across clips {now['spread_across']:.3f} (at the start "
            f"{at_start['spread_across']:.3f}), uncentred rank {now['rank_uncentered']:.1f}. Raise loss.std_coeff and "
            "loss.cov_coeff (1 to 4), or lower optimization.lr, or start optimization.ema nearer to 1",
            stacklevel=2,
        )
