"""Fit heads that learn from all samples at once."""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from tubelet.probing import heads as ensemble
from tubelet.probing.features import Features
from tubelet.probing.fit import Fitted, OnEpoch, Settings


@dataclasses.dataclass(frozen=True)
class AtOnceFitter:
    """Fits the heads of one probe on different subsets of its training videos, as `Fitter` does by gradient descent.

    Nothing is saved in between: a run that is stopped starts its fit again.

    Attributes:
        features: Features of the training videos.
        make_head: Returns a new head with the given options.
        attend_across_segments: See `heads.read_out`.
        global_batch: Videos that all processes read at a time.
    """

    features: Features
    make_head: Callable[..., ensemble.Head]
    attend_across_segments: bool
    global_batch: int

    def fit(self, stage: str, grid: list[Settings], indices: Tensor, on_epoch: OnEpoch | None = None) -> Fitted:
        """As `Fitter.fit`, with options of the head in `grid` and without epochs."""
        tokens, labels = self.features.gather(
            indices.split(self.global_batch), lambda x: ensemble.per_prediction(x, self.attend_across_segments)
        )
        labels = labels.repeat_interleave(tokens.shape[1])
        device = self.features.encoder.device
        members = []
        for settings in grid:
            head = self.make_head(**{name: (value,) for name, value in settings.items()}).to(device)
            assert isinstance(head, ensemble.FittedHead)
            head.fit(tokens.flatten(0, 1).to(device), labels.to(device))
            head.built_from = {**head.built_from, "num_samples": len(labels)}
            members.append(head)
        return Fitted(ensemble.Heads(members).eval(), [{} for _ in grid])

    def epochs_done(self, stage: str, num_samples: int) -> int:
        return 0

    def epochs(self, num_samples: int) -> int:
        return 0
