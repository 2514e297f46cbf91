"""The samples of each step."""

import numpy as np
import torch

from tubelet.config import ConfigError
from tubelet.data.types import Draw
from tubelet.runtime.seeds import Purpose, numpy_generator


class SampleStream:
    """An endless shuffled stream of samples, cut into steps. `draws(step)` is a pure function of the step.

    A pass has as many draws as all sources have samples. Without weights it contains every sample once. With weights
    each source gets its fraction of the pass (to the nearest integer) and continues in the next pass where it stopped,
    so that each sample of a source comes once before any is repeated.

    Args:
        dataset_sizes: Number of samples of each source; sample indices run over all sources.
        weights: Relative weight of each source; None: in proportion to the sizes.
        batch_size: Samples of a step over all processes.
        seed: Seed of the orders.
        shuffle: False for the order of the files.

    Raises:
        ConfigError: A positive weight is too small for a single draw per pass.
    """

    def __init__(
        self, dataset_sizes: list[int], weights: list[float] | None, batch_size: int, seed: int, shuffle: bool = True
    ):
        self.sizes = np.array(dataset_sizes, dtype=np.int64)
        if len(self.sizes) == 0 or self.sizes.min() < 1:
            raise ValueError(f"every source needs at least one sample, got sizes {dataset_sizes}")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.pass_length = int(self.sizes.sum())
        self.quotas = self.sizes if weights is None else _quotas(self.pass_length, weights)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._quota_ends = np.cumsum(self.quotas)
        self._orders: dict[tuple[int, ...], np.ndarray] = {}

    @property
    def steps_per_pass(self) -> int:
        """Steps that draw about as many samples as there are; at least one."""
        return max(1, self.pass_length // self.batch_size)

    def draws(self, step: int) -> list[Draw]:
        """Return the `batch_size` draws of a step in order; each process takes a slice of them."""
        first = step * self.batch_size
        positions = range(self.batch_size)
        return [self._draw(step, position, *divmod(first + position, self.pass_length)) for position in positions]

    def _draw(self, step: int, position: int, number: int, offset: int) -> Draw:
        """Return draw `offset` of pass `number`."""
        pass_index = self._order(self.pass_length, Purpose.PASS_ORDER, number)[offset]
        source = int(np.searchsorted(self._quota_ends, pass_index, side="right"))
        rank_in_quota = pass_index - (self._quota_ends[source] - self.quotas[source])
        epoch, rank = divmod(int(number * self.quotas[source] + rank_in_quota), int(self.sizes[source]))
        index = self._starts[source] + self._order(int(self.sizes[source]), Purpose.SOURCE_ORDER, epoch, source)[rank]
        return Draw(step, epoch, int(index), position)

    def _order(self, length: int, purpose: Purpose, *key: int) -> np.ndarray:
        """Return a permutation; `key` is the pass, or epoch and source. The most recent ones are cached."""
        if not self.shuffle:
            return np.arange(length)
        name = (purpose, *key)
        if name not in self._orders:
            while len(self._orders) > 4 * len(self.sizes) + 4:
                del self._orders[next(iter(self._orders))]
            self._orders[name] = numpy_generator(self.seed, purpose, *key).permutation(length)
        return self._orders[name]


def evenly_spaced(length: int, number: int) -> torch.Tensor:
    """Return at most `number` indices, int64, evenly spaced from the first to the last of `length` samples."""
    return torch.linspace(0, length - 1, min(number, length), dtype=torch.float64).long()


def _quotas(total: int, weights: list[float]) -> np.ndarray:
    """Return integers in proportion to `weights` that sum to `total` (largest remainder method)."""
    exact = total * np.array(weights) / np.sum(weights)
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: total - quotas.sum()]] += 1
    if any(weight > 0 and quota == 0 for weight, quota in zip(weights, quotas, strict=True)):
        raise ConfigError(
            f"data.datasets_weights: with {weights} a source would never be drawn in a pass of {total} draws; "
            "raise its weight"
        )
    return quotas
