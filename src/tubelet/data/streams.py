"""Which sample stands at which place of which step."""

import numpy as np

from tubelet.config import ConfigError
from tubelet.data import Draw
from tubelet.data.randomness import Purpose, generator


class SampleStream:
    """An endless, shuffled stream of samples, cut into steps; `draws(step)` is a pure function of the step.

    One pass is as long as all sources together. Without weights every sample comes exactly once in it; with weights
    each source gets its share of the pass (to the nearest whole sample), and goes on in the next pass where it stopped,
    so that each sample of a source comes once before any comes again.

    dataset_sizes: samples of each source; a sample's index counts through all sources.
    batch_size: of a step over all processes. Raises ConfigError where a weight is too small for a single draw.
    """

    def __init__(
        self, dataset_sizes: list[int], weights: list[float] | None, batch_size: int, seed: int, shuffle: bool = True
    ):
        self.sizes = np.array(dataset_sizes, dtype=np.int64)
        if len(self.sizes) == 0 or self.sizes.min() < 1:
            raise ValueError(f"every source needs at least one sample, got sizes {dataset_sizes}")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.pass_length = int(self.sizes.sum())
        self.quotas = self.sizes if weights is None else _shares(self.pass_length, weights)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._quota_ends = np.cumsum(self.quotas)
        self._orders: dict[tuple[int, ...], np.ndarray] = {}

    def draws(self, step: int) -> list[Draw]:
        """The `batch_size` draws of a step, in order; the rows of a process are a slice of them."""
        first = step * self.batch_size
        return [self._draw(step, slot, *divmod(first + slot, self.pass_length)) for slot in range(self.batch_size)]

    def _draw(self, step: int, slot: int, number: int, place: int) -> Draw:
        """Draw at `place` of pass `number`."""
        ticket = self._order(self.pass_length, Purpose.PASS_ORDER, number)[place]
        source = int(np.searchsorted(self._quota_ends, ticket, side="right"))
        rank_in_quota = ticket - (self._quota_ends[source] - self.quotas[source])
        epoch, rank = divmod(int(number * self.quotas[source] + rank_in_quota), int(self.sizes[source]))
        index = self._starts[source] + self._order(int(self.sizes[source]), Purpose.SOURCE_ORDER, epoch, source)[rank]
        return Draw(step, epoch, int(index), slot)

    def _order(self, length: int, *key: int) -> np.ndarray:
        """A permutation; key: the pass, or epoch and source. The newest few are kept."""
        if not self.shuffle:
            return np.arange(length)
        if key not in self._orders:
            while len(self._orders) > 4 * len(self.sizes) + 4:
                del self._orders[next(iter(self._orders))]
            self._orders[key] = generator(self.seed, *key).permutation(length)
        return self._orders[key]


def _shares(total: int, weights: list[float]) -> np.ndarray:
    """Whole numbers in the proportion of `weights` that sum to `total` (largest remainders)."""
    exact = total * np.array(weights) / np.sum(weights)
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    if any(w > 0 and share == 0 for w, share in zip(weights, shares, strict=True)):
        raise ConfigError(
            f"data.datasets_weights: with {weights} a source would never be drawn among {total}; raise its weight"
        )
    return shares
