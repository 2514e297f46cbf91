"""The samples of each step."""

from collections.abc import Sequence

import numpy as np
import torch

from tubelet.config import ConfigError
from tubelet.data.permutation import Order, random_order
from tubelet.data.rows import Rows
from tubelet.data.types import Draw
from tubelet.runtime.seeds import Purpose, numpy_generator

_AT_ONCE = 1 << 20
"""Durations that are in memory at once."""


class SampleStream:
    """An endless shuffled stream of samples, cut into steps. `draws(step)` is a pure function of the step.

    A pass has as many draws as all sources have samples. Without weights it contains every sample once. With weights
    each source gets its fraction of the pass (to the nearest integer) and continues in the next pass where it stopped,
    so that each sample of a source comes once before any is repeated.

    With durations, the draws of a source are evenly spaced over its seconds of video, as many as it has samples before
    the next round, with a new offset in each. So a round has each sample as often as its fraction of the seconds says,
    rounded down or up.

    Args:
        dataset_sizes: Number of samples of each source; sample indices run over all sources.
        weights: Relative weight of each source; None: in proportion to the sizes, or to the durations where given.
        batch_size: Samples of a step over all processes.
        seed: Seed of the orders.
        shuffle: False for the order of the files.
        clips_per_sample: How often a pass has each sample, which then counts as this many. Their epochs differ, and so
            do the clips: epoch e of one is e · clips_per_sample + j, where j is the number of the repeat.
        cumulative_durations: For each source, the seconds of each sample and all before it. None: samples of a source
            are drawn equally often.

    Raises:
        ConfigError: A positive weight is too small for a single draw per pass.
    """

    def __init__(
        self,
        dataset_sizes: list[int],
        weights: list[float] | None,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        clips_per_sample: int = 1,
        cumulative_durations: Sequence[Rows[float]] | None = None,
    ):
        self.sizes = np.array(dataset_sizes, dtype=np.int64) * clips_per_sample
        if len(self.sizes) == 0 or self.sizes.min() < 1:
            raise ValueError(f"every source needs at least one sample, got sizes {dataset_sizes}")
        self.batch_size, self.seed, self.shuffle, self.clips_per_sample = batch_size, seed, shuffle, clips_per_sample
        self.durations = None
        if cumulative_durations is not None:
            sources = zip(cumulative_durations, self.sizes.tolist(), strict=True)
            self.durations = [DurationDraws(durations, draws) for durations, draws in sources]
        if weights is None and self.durations is not None:
            weights = [durations.total for durations in self.durations]
        self.pass_length = int(self.sizes.sum())
        self.quotas = self.sizes if weights is None else _quotas(self.pass_length, weights)
        self._first_samples = (np.cumsum(self.sizes) - self.sizes) // clips_per_sample
        self._quota_ends = np.cumsum(self.quotas)
        self._orders: dict[tuple[int, ...], Order] = {}

    @property
    def steps_per_pass(self) -> int:
        """Steps that draw about as many samples as there are; at least one."""
        return max(1, self.pass_length // self.batch_size)

    def draws(self, step: int) -> list[Draw]:
        """Return the `batch_size` draws of a step in order; each process takes a slice of them."""
        number, offset = np.divmod(step * self.batch_size + np.arange(self.batch_size), self.pass_length)
        pass_index = self._items(self.pass_length, Purpose.PASS_ORDER, number, offset)
        source = np.searchsorted(self._quota_ends, pass_index, side="right")
        rank_in_quota = pass_index - (self._quota_ends - self.quotas)[source]
        round_, rank = np.divmod(number * self.quotas[source] + rank_in_quota, self.sizes[source])
        epochs, indices = np.empty_like(rank), np.empty_like(rank)
        for one in np.unique(source).tolist():
            mine = source == one
            items = self._items(int(self.sizes[one]), Purpose.SOURCE_ORDER, round_[mine], rank[mine], one)
            if self.durations is not None:
                epochs[mine], of_source = self.durations[one].draw(self.seed, one, round_[mine], items)
            else:
                of_source, repeat = np.divmod(items, self.clips_per_sample)
                epochs[mine] = round_[mine] * self.clips_per_sample + repeat
            indices[mine] = self._first_samples[one] + of_source
        drawn = zip(epochs.tolist(), indices.tolist(), strict=True)
        return [Draw(step, epoch, index, position) for position, (epoch, index) in enumerate(drawn)]

    def _items(
        self, length: int, purpose: Purpose, numbers: np.ndarray, positions: np.ndarray, *key: int
    ) -> np.ndarray:
        """Return the items at `positions` of the orders `numbers`."""
        items = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            items[mine] = (
                self._order(length, purpose, number, *key)[positions[mine]] if self.shuffle else positions[mine]
            )
        return items

    def _order(self, length: int, purpose: Purpose, *key: int) -> Order:
        """Return a permutation; `key` is the pass, or epoch and source. The most recent ones are cached."""
        name = (purpose, *key)
        if name not in self._orders:
            while len(self._orders) > 4 * len(self.sizes) + 4:
                del self._orders[next(iter(self._orders))]
            self._orders[name] = random_order(length, self.seed, purpose, *key)
        return self._orders[name]


class DurationDraws:
    """Draws of the samples of one source in proportion to their durations.

    Args:
        cumulative: Seconds of each sample and all before it.
        draws: Number of draws in a round.
    """

    def __init__(self, cumulative: Rows[float], draws: int):
        self._cumulative, self._draws = cumulative, draws
        ends = np.asarray(cumulative)
        self.total = float(ends[-1])
        parts = (ends[start : start + _AT_ONCE + 1] for start in range(0, len(ends) - 1, _AT_ONCE))
        longest = max([float(ends[0]), *(float(np.diff(part).max()) for part in parts)])
        self._most = int(longest / self.total * draws) + 2
        """Draws of the longest sample in a round are fewer."""

    def draw(self, seed: int, source: int, rounds: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return epoch and index of draws `items` of the `rounds`: draw i is at second (i + offset) · total / draws.

        The epoch is another one for each draw of a sample, so that no two are the same clip.
        """
        ends = np.asarray(self._cumulative)
        spacing = self.total / self._draws
        epochs, indices = np.empty_like(items), np.empty_like(items)
        for number in np.unique(rounds).tolist():
            mine = rounds == number
            offset = numpy_generator(seed, Purpose.DURATION_OFFSET, number, source).random()
            seconds = (items[mine] + offset) * spacing
            index = np.minimum(np.searchsorted(ends, seconds, side="right"), len(ends) - 1)
            begin = np.where(index > 0, ends[index - 1], 0.0)
            first = np.ceil(begin / spacing - offset).astype(np.int64)  # draw of this sample, up to rounding
            first -= (first > 0) & ((first - 1 + offset) * spacing >= begin)
            first += (first + offset) * spacing < begin
            epochs[mine], indices[mine] = number * self._most + items[mine] - first, index
        return epochs, indices


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
