"""Random tubes: single spatial positions, drawn at random, are hidden in all frames (VideoMAE, arXiv:2203.12602)."""

import numpy as np
import pydantic

from tubelet.config import Config
from tubelet.masks import BaseMaskCollator, random_order, split, tubes


class MaskConfig(Config):
    """Options of one random-tube mask.

    Args:
        ratio: share of the spatial positions that are hidden, between 0 and 1.
    """

    ratio: float = 0.9

    @pydantic.field_validator("ratio")
    @classmethod
    def _share(cls, ratio: float) -> float:
        if not 0 < ratio < 1:
            raise ValueError(
                f"{ratio} is not between 0 and 1: it is the share of the tokens that are hidden, as in 0.9"
            )
        return ratio


class MaskCollator(BaseMaskCollator):
    """Context: columns of tokens drawn at random. Target: all the others. See `BaseMaskCollator`.

    Every sample keeps the same number of tokens, so nothing is cut and there is no `truncate`.
    """

    config_type = MaskConfig

    def _draws_tubes(self, config: MaskConfig) -> bool:
        return True

    def _check(self, config: MaskConfig) -> None:
        if not 0 < self._num_context(config) < self.grid.columns:
            raise ValueError(
                f"ratio: {config.ratio} of {self.grid.columns} positions leaves {self._num_context(config)} of them "
                "as context; both context and target need one at least"
            )

    def _sample(self, config: MaskConfig, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        num_context = self._num_context(config)
        hidden = np.zeros((batch_size, self.grid.columns), dtype=bool)
        order = random_order(hidden.shape, rng)
        context, target = split(hidden, order, num_context, self.grid.columns - num_context)
        return tubes(context, self.grid), tubes(target, self.grid)

    def _num_context(self, config: MaskConfig) -> int:
        # The small number: in floats, 10 * (1 - 0.9) is just below 1.
        return int(self.grid.columns * (1 - config.ratio) + 1e-9)
