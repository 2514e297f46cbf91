"""What is learned. Each module here is an objective, selected by `objective: {name: …}`.

An objective module has

- `Options`, a subclass of `ObjectiveOptions`: the YAML section `objective`;
- `build(options, setup)`: the `Objective` (a module with the loss) for the encoder, clips and masks of a run;
- optionally `further_masks(options, setup)`: samplers of masks of other views than `clip`. A batch has their masks
  after those of the YAML's list `mask`.
- optionally `CURVES`: figures for the report (`tubelet.report.curves.Curves`), and `REMEDIES`: what to change when
  the features collapse, for all kinds or by kind (`tubelet.training.collapse.Remedies`).

A module outside of this package serves as well: `objective: {name: my_package.my_objective}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from tubelet.config.registry import PartOptions, find
from tubelet.grid import ClipShape, SoundShape
from tubelet.masks import MaskSampler
from tubelet.models import build_encoder, build_predictor
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.models.video_encoder import VideoEncoder
from tubelet.training.collapse import Remedies
from tubelet.training.objective import Objective, ObjectiveOptions


class Masks(Protocol):
    """The part of a mask collator that objectives use; see `tubelet.masks`."""

    @property
    def draws_tubes(self) -> bool: ...

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an objective is built from besides its own options.

    Args:
        encoder: Options of the encoder.
        clip: Size of the clips and tubelets.
        masks: Masks of the run; None without masks.
        mean: Mean of each color channel in [0, 1], for the normalization of clips.
        std: Standard deviation of each color channel.
        schedule_steps: Number of steps over which schedules run.
        sound: Size of the sound of a clip; None where it is not read.
    """

    encoder: PartOptions
    clip: ClipShape
    masks: Masks | None
    mean: Sequence[float]
    std: Sequence[float]
    schedule_steps: float
    sound: SoundShape | None = None

    def build_encoder(self, *, drop_tokens: bool, levels: int = 1) -> Encoder:
        """Build the encoder.

        Args:
            drop_tokens: Whether the encoder has to work on the visible tokens alone.
            levels: Number of levels whose tokens the objective reads (`Encoder.levels`); 1: the last tokens only.

        Raises:
            ValueError: The encoder does not fit the clips, needs all tokens, or has another number of levels.
        """
        encoder = build_encoder(self.encoder, self.clip)
        if drop_tokens and not encoder.accepts_masks:
            raise ValueError(f"encoder.name: {self.encoder.name} needs all tokens and cannot encode a part of the clip")
        offered = len(getattr(encoder, "levels", ()))
        if levels > 1 and not offered:
            raise ValueError(
                f"encoder.name: {self.encoder.name} returns the tokens of its last block only, and the objective reads "
                f"{levels} levels; take a vision transformer such as vit_base"
            )
        if max(1, offered) != levels:
            raise ValueError(
                f"encoder.levels: the objective reads {levels} level(s), the encoder has {offered}; set "
                f"encoder.levels: {levels}"
            )
        if isinstance(encoder, VideoEncoder) and self.masks is not None:
            encoder.tube_masks = self.masks.draws_tubes
        return encoder

    def build_predictor(
        self, options: PartOptions, encoder: Encoder, num_masks: int, *, key: str = "objective.predictor", **given: Any
    ) -> Predictor:
        """Build the predictor for the features of `encoder`; `given`: see `tubelet.models.build_predictor`.

        Raises:
            ValueError: The options at `key`, which the message names, do not fit the encoder or the clips.
        """
        try:
            return build_predictor(options, encoder, self.clip, num_mask_tokens=num_masks, **given)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None

    def num_masks(self, at_least: int = 0, at_most: int | None = None) -> int:
        """Return the number of masks; raise ValueError where the objective cannot work with so many."""
        count = 0 if self.masks is None else len(self.masks)
        if count < at_least or (at_most is not None and count > at_most):
            expected = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
            raise ValueError(f"mask: this objective needs {expected} mask(s), the list has {count}")
        return count


def build(options: ObjectiveOptions, setup: Setup) -> Objective:
    """Build the objective that `options.name` names. Raises ValueError where its parts do not fit together."""
    module = find("objectives", options.name)
    if not hasattr(module, "build"):
        raise ValueError(f"objective.name: {module.__name__} has no function build(options, setup)")
    objective = module.build(options, setup)
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective.name: {module.__name__}.build returned {type(objective).__name__}, not an instance of "
            "tubelet.training.objective.Objective"
        )
    return objective


def further_masks(options: ObjectiveOptions, setup: Setup) -> Sequence[MaskSampler]:
    """Return samplers of masks of other views than `clip`; ValueError where they do not fit the views."""
    module = find("objectives", options.name)
    return module.further_masks(options, setup) if hasattr(module, "further_masks") else ()


def remedies(options: ObjectiveOptions) -> Remedies:
    """Return what to change when the features collapse, as the objective's module says in `REMEDIES`."""
    return getattr(find("objectives", options.name), "REMEDIES", ())
