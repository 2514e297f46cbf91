"""Random tubes: single spatial positions, drawn at random, are hidden in all frames (VideoMAE, arXiv:2203.12602)."""

import numpy as np
import pydantic

from tubelet.config import Config
from tubelet.masks import CollatorOfOneKind, MaskSampler, random_order, split, tubes


class MaskConfig(Config):
    """Options of one random-tube mask.

    Args:
        ratio: Fraction of the spatial positions that are hidden, between 0 and 1.
    """

    name: str = "random_tube"
    ratio: float = 0.9

    @pydantic.field_validator("ratio")
    @classmethod
    def _check_ratio(cls, ratio: float) -> float:
        if not 0 < ratio < 1:
            raise ValueError(
                f"{ratio} is not between 0 and 1: it is the fraction of the tokens that are hidden, as in 0.9"
            )
        return ratio


class Sampler(MaskSampler):
    """Context: columns of tokens drawn at random. Target: all the others.

    Every sample keeps the same number of tokens, so nothing is cut and there is no `truncate`.
    """

    config: MaskConfig
    draws_tubes = True

    def check(self) -> None:
        if not 0 < self._num_context() < self.grid.tokens_per_frame:
            raise ValueError(
                f"ratio: {self.config.ratio} of {self.grid.tokens_per_frame} positions leaves {self._num_context()} of "
                "them as context; both context and target need at least one"
            )

    def sample(
        self, batch_size: int, rng: np.random.Generator, shared: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        num_context, positions = self._num_context(), self.grid.tokens_per_frame
        hidden = np.zeros((batch_size, positions), dtype=bool)
        context, target = split(hidden, random_order(hidden.shape, rng), num_context, positions - num_context)
        return tubes(context, self.grid), tubes(target, self.grid)

    def _num_context(self) -> int:
        # 1e-9, because 10 * (1 - 0.9) is just below 1 in floats.
        return int(self.grid.tokens_per_frame * (1 - self.config.ratio) + 1e-9)


class MaskCollator(CollatorOfOneKind):
    """Draws random-tube masks; the arguments are V-JEPA's."""

    config_type = MaskConfig
    sampler_type = Sampler
