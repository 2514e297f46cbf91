"""What is in a generated scene: a group of equal sprites drifts and shows two events, while the camera may zoom.

The attributes of a scene are independent of each other and of where the sprites are, except that some pairs of color
and shape are held out to test compositional generalization.
"""

from dataclasses import asdict, dataclass

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "count": ("one", "two", "three", "four"),
    "color": ("red", "green", "blue", "yellow"),
    "shape": ("disc", "square", "triangle", "cross"),
    "direction": ("left", "right", "up", "down"),
    "camera": ("stays still", "zooms in", "zooms out"),
    "first": ("flash", "blink", "swell"),
    "second": ("flash", "blink", "swell"),
}
EVENTS = ATTRIBUTES["first"]
HELD_OUT = tuple(zip(ATTRIBUTES["color"], ("square", "triangle", "cross", "disc"), strict=True))
"""Pairs of color and shape that only the split `test_combinations` has."""

DURATION = 3.0
"""Seconds of a video."""
EVENT_DURATION = 0.6
"""Seconds of an event and of its tone."""
ONSETS = ((0.2, 0.8), (1.6, 2.2))
"""Seconds between which the first and the second event begin."""


@dataclass(frozen=True)
class Scene:
    """The attributes of a scene, each a value of `ATTRIBUTES`; the two events differ."""

    count: str
    color: str
    shape: str
    direction: str
    camera: str
    first: str
    second: str

    def attributes(self) -> dict[str, str]:
        """Return attribute -> value."""
        return asdict(self)

    @property
    def number(self) -> int:
        """Number of sprites."""
        return ATTRIBUTES["count"].index(self.count) + 1


def draw_scenes(rng: np.random.Generator, amount: int, *, held_out: bool = False) -> list[Scene]:
    """Draw scenes in which the values of each attribute are equally frequent.

    Args:
        rng: Source of the draws.
        amount: Number of scenes.
        held_out: Take the pairs of color and shape of `HELD_OUT`; false: all others.
    """
    pairs = [(c, s) for c in ATTRIBUTES["color"] for s in ATTRIBUTES["shape"] if ((c, s) in HELD_OUT) == held_out]
    orders = [(first, second) for first in EVENTS for second in EVENTS if first != second]
    columns = [
        _balanced(rng, values, amount)
        for values in (ATTRIBUTES["count"], pairs, ATTRIBUTES["direction"], ATTRIBUTES["camera"], orders)
    ]
    return [
        Scene(count, color, shape, direction, camera, first, second)
        for count, (color, shape), direction, camera, (first, second) in zip(*columns, strict=True)
    ]


def _balanced(rng: np.random.Generator, values, amount: int) -> list:
    """Return `amount` of the values in random order, each as often as the others, or once more."""
    rounds = [rng.permutation(len(values)) for _ in range(-(-amount // len(values)))]
    repeated = np.concatenate([np.empty(0, np.int64), *rounds])[:amount]
    return [values[i] for i in rng.permutation(repeated)]
