"""Tells collapse of an encoder's features from learning, by their statistics and the loss.

An objective whose targets the encoder itself computes can lower its loss by giving up information: features that are
constant, that lie in a few directions or that ignore time are easy to predict and invariant to any view. Those with
fixed targets (labels, pixels) cannot, and may well need few dimensions only; their features collapse where the
optimization fails. The limits compare a run with its own start, as the figures of random features depend on the data,
the architecture and the initial scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Figures = Mapping[str, "float | None"]
"""Result of `FeatureMonitor.measure`, or a line of the log, where None stands for NaN."""
Remedies = Sequence[str] | Mapping[str, Sequence[str]]
"""What to change when the features collapse, for all kinds, or by the name of the kind with the key "any" for all."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of collapse: a quantity that falls below a fraction of what it was.

    Args:
        name: Key of the event in the log.
        quantity: Computes the quantity from the figures; NaN where one is unknown.
        limit: Fraction of the highest value so far (`of_peak`) or of the value at the start of the run. Where the loss
            has fallen meanwhile, the product with the fraction of the loss that is left counts.
        max_fraction: Above this fraction nothing is reported, however much the loss has fallen.
        of_peak: See `limit`.
        learned: Whether fixed targets can require it, which makes it no collapse for objectives that have such.
        meaning: What has happened.
        label: Name of the quantity in messages.
        includes: Kinds that need not be reported besides this one.
    """

    name: str
    quantity: Callable[[Figures], float]
    limit: float
    meaning: str
    label: str
    max_fraction: float = 0.5
    of_peak: bool = False
    learned: bool = False
    includes: tuple[str, ...] = ()


def _figure(name: str) -> Callable[[Figures], float]:
    """Return the quantity that is the figure `name`; NaN where the figure is unknown."""

    def quantity(figures: Figures) -> float:
        value = figures.get(name)
        return math.nan if value is None else value

    return quantity


def _spread(figures: Figures) -> float:
    """Standard deviation of all tokens of all clips around their common mean, relative to their RMS."""
    return math.hypot(_figure("spread_across")(figures), _figure("spread_within")(figures))


def _share(name: str) -> Callable[[Figures], float]:
    """Return the quantity that is the figure `name` relative to `_spread`.

    Thus it does not fall where a vector that all tokens have in common grows: that is `drift` alone.
    """
    return lambda figures: _figure(name)(figures) / max(_spread(figures), 1e-12)


KINDS = (
    Kind(
        "complete",
        _figure("spread_across"),
        0.1,
        "all clips get the same features",
        "the standard deviation across clips, relative to the RMS of the features",
        max_fraction=0.1,
        includes=("drift", "dimensional", "token", "temporal"),
    ),
    Kind(
        "drift",
        _spread,
        0.25,
        "a vector that all tokens of all clips have in common outgrows what tells them apart",
        "the standard deviation of all tokens, relative to their RMS,",
    ),
    Kind(
        "dimensional",
        _figure("residual_variance"),
        0.06,
        "few directions are left in which clips differ",
        "the fraction of the variance across clips outside of its first two principal components",
        of_peak=True,
        learned=True,
    ),
    Kind(
        "token",
        _share("spread_tokens"),
        0.25,
        "all tokens of a clip get the same features",
        "the standard deviation within a clip, relative to that of all tokens,",
        includes=("temporal",),
    ),
    Kind(
        "temporal",
        _share("spread_time"),
        0.25,
        "the features of a clip do not change over time",
        "the standard deviation over the time slots of a clip, relative to that of all tokens,",
    ),
)
"""Limits: chosen on healthy runs and on runs made to collapse, see docs/collapse.md."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Figures of the features after `step`, and the mean loss of the steps since the previous measurement."""

    step: int
    figures: Figures
    loss: float | None = None


class CollapseDetector:
    """Reports each kind of collapse once.

    Args:
        remedies: See `Remedies`.
        fixed_targets: See `Objective`.
    """

    def __init__(self, remedies: Remedies = (), fixed_targets: bool = False):
        self.fixed_targets = fixed_targets
        self.remedies = remedies if isinstance(remedies, Mapping) else {"any": remedies}
        self.history: list[Measurement] = []
        self.reported: set[str] = set()

    def restore(self, log: Sequence[Mapping[str, Any]]) -> list[float]:
        """Continue from the lines of a log; return the losses since the last measurement."""
        losses: list[float] = []
        for line in log:
            losses += [] if line.get("loss") is None else [line["loss"]]
            for kind in KINDS:
                if kind.name in line.get("events", {}):
                    self.reported |= {kind.name, *kind.includes}
            if "spread_across" in line:
                self.history.append(Measurement(line["step"], line, sum(losses) / len(losses) if losses else None))
                losses = []
        return losses

    def update(self, measurement: Measurement) -> dict[str, str]:
        """Add a measurement, and return the kinds of collapse that it shows for the first time, with their messages."""
        self.history.append(measurement)
        found = {}
        for kind in KINDS:
            reference = self._reference(kind)
            if reference is None or kind.name in self.reported or (kind.learned and self.fixed_targets):
                continue
            before, now = kind.quantity(reference.figures), kind.quantity(measurement.figures)
            if now < kind.max_fraction * before and now * self._loss_left(reference) < kind.limit * before:
                self.reported |= {kind.name, *kind.includes}
                found[kind.name] = self._message(kind, reference)
        return found

    def _reference(self, kind: Kind) -> Measurement | None:
        """Return the measurement to compare with; None where there is none of this quantity."""
        known = [m for m in self.history if not math.isnan(kind.quantity(m.figures))]
        if not known:
            return None
        return max(known, key=lambda m: kind.quantity(m.figures)) if kind.of_peak else known[0]

    def _message(self, kind: Kind, reference: Measurement) -> str:
        now = self.history[-1]
        since = "at the start" if reference is self.history[0] else f"after step {reference.step}"
        return (
            f"{kind.name} collapse after step {now.step}: {kind.meaning}. {kind.label[0].upper()}{kind.label[1:]} is "
            f"{kind.quantity(now.figures):.3g} ({since} {kind.quantity(reference.figures):.3g}). "
            + self._loss(reference)
            + "Remedies: "
            + "; ".join([*self.remedies.get(kind.name, ()), *self.remedies.get("any", ()), "lower optimization.lr"])
        )

    def _losses(self, reference: Measurement) -> tuple[float, float]:
        """Return the mean losses of the steps after the reference and of the last steps; NaN where unknown."""
        after = next(i for i, m in enumerate(self.history) if m is reference) + 1
        measurements = (self.history[min(after, len(self.history) - 1)], self.history[-1])
        before, now = (math.nan if m.loss is None else m.loss for m in measurements)
        return before, now

    def _loss_left(self, reference: Measurement) -> float:
        """Return the fraction of the loss that is left; 1 where it has not fallen, or where collapse cannot lower it.

        Learning may give up directions, and it lowers the loss, but hardly both by much.
        """
        before, now = self._losses(reference)
        return now / before if 0 < now < before and not self.fixed_targets else 1.0

    def _loss(self, reference: Measurement) -> str:
        """Say what the loss did since the reference."""
        before, now = self._losses(reference)
        if math.isnan(before) or math.isnan(now):
            return ""
        change = f"The loss went from {before:.4g} to {now:.4g} meanwhile"
        if now < before and not self.fixed_targets:
            return f"{change}: it fell because the features lost information, not because the encoder learned. "
        return f"{change}. "
