"""LeVJEPA: several views of a clip have the same projection, and SIGReg prevents collapse (Kuhn et al. 2026,
arXiv:2608.27395). One encoder; no EMA, no stop-gradient, no predictor.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor, nn

from tubelet.data import Batch, ViewOptions, to_float
from tubelet.grid import Grid
from tubelet.models.interfaces import Encoder
from tubelet.objectives import Setup
from tubelet.objectives.losses.projector import Projector
from tubelet.objectives.losses.sigreg import SIGRegOptions, sigreg
from tubelet.report.curves import Curves
from tubelet.training.objective import Objective, ObjectiveOptions, StepRng

CURVES = (
    Curves(
        "loss",
        "Loss",
        "",
        {
            "loss": "total",
            "loss_inv": "invariance term",
            "loss_sigreg": "SIGReg",
            "loss_slot": "prediction of the next time slot",
            "loss_slot_sigreg": "SIGReg of the time slots",
        },
        "Loss terms of LeVJEPA. Look for: SIGReg that falls to about 1, its value for normally distributed projections "
        "(with `sigreg.times_batch`), and an invariance term that falls slowly. An invariance term near zero with a "
        "SIGReg that stays high means that all clips have the same projection: collapse.",
        smooth=True,
    ),
)
REMEDIES = (
    "raise objective.sigreg_coeff (2 to 10 times)",
    "raise data.batch_size",
)

Fraction = Annotated[float, Field(ge=0, lt=1)]
GLOBAL = "global"


class Options(ObjectiveOptions):
    """YAML section `objective` with `name: levjepa`."""

    name: str = "levjepa"
    views: dict[str, ViewOptions] = {GLOBAL: ViewOptions(count=2)}
    """Crops of each clip. All are compared with the mean of those of the view `global`."""
    token_drop: Fraction | dict[str, Fraction] = 0.95
    """Fraction of the tokens that are dropped at random: one number, or one for each view."""
    projector_input: Literal["mean", "slots"] = "mean"
    """`mean`: the mean token. `slots`: the mean tokens of all time slots, concatenated, so that the projection depends
    on the order of the frames; then equally many tokens are kept in each slot."""
    projector_hidden_dim: int = Field(2048, ge=1)
    """Width of the hidden layers of the projector."""
    projector_dim: int = Field(256, ge=1)
    """Width of the projections, on which the loss is computed."""
    sigreg_coeff: float = Field(0.02, ge=0)
    """Weight of SIGReg; that of the invariance term is 1."""
    sigreg: SIGRegOptions = SIGRegOptions()
    slot_coeff: float = Field(0.0, ge=0)
    """Weight of the prediction of the projection of each time slot from the mean token of the slot before it, which in
    an encoder with `block_causal: true` has seen that slot and all earlier ones. SIGReg acts on these projections, too.
    """

    @field_validator("views")
    @classmethod
    def _enough_views(cls, views: dict[str, ViewOptions]) -> dict[str, ViewOptions]:
        if GLOBAL not in views or not views[GLOBAL].count:
            raise ValueError(f"a view with the name '{GLOBAL}' is needed; the others are compared with it")
        if sum(view.count for view in views.values()) < 2:
            raise ValueError(f"at least two crops of a clip are needed: raise {GLOBAL}.count, or add another view")
        return views

    def data_views(self) -> Mapping[str, ViewOptions]:
        return self.views

    def check_batch(self, num_clips: int) -> None:
        self.sigreg.check_batch(num_clips)

    @property
    def by_slot(self) -> bool:
        """Whether the mean token of each time slot is needed."""
        return self.projector_input == "slots" or self.slot_coeff > 0


class LeVJEPA(Objective):
    """Makes the projections of several views of a clip equal, and their distribution over the clips normal.

    With gradient accumulation, SIGReg and the projector's batch norm see the clips of a part in all processes.

    Args:
        encoder: Any encoder that accepts masks and crops of these sizes.
        options: Views and loss.
        grids: Token grid of each view.
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
    """

    def __init__(
        self,
        encoder: Encoder,
        options: Options,
        grids: Mapping[str, Grid],
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.encoder, self.options, self.grids, self.mean, self.std = encoder, options, grids, mean, std
        width, hidden, out = encoder.embed_dim, options.projector_hidden_dim, options.projector_dim
        slots = grids[GLOBAL].t if options.projector_input == "slots" else 1
        self.projector = Projector(slots * width, hidden, out)
        if options.slot_coeff:
            self.slot_projector = Projector(width, hidden, out)
            self.slot_predictor = Projector(width, hidden, out)

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the invariance term and SIGReg, averaged over the views."""
        o = self.options
        slots = {name: self.slot_means(batch, rng, name) for name in self.grids}
        features = torch.cat(list(slots.values()))  # [V, B, slots, D]
        if o.projector_input == "mean":
            projections = self.projector(features.mean(2)).float()
        else:
            projections = self.projector(features.flatten(2)).float()
        center = projections[: len(slots[GLOBAL])].mean(0)
        inv = (projections - center).square().mean()
        gauss = sigreg(projections, rng, o.sigreg)
        loss, terms = inv + o.sigreg_coeff * gauss, {"loss_inv": inv, "loss_sigreg": gauss}
        if o.slot_coeff:
            following = self.slot_projector(features).float()
            predicted = self.slot_predictor(features[:, :, :-1]).float()
            slot = (predicted - following[:, :, 1:]).square().mean()
            slot_gauss = sigreg(following.transpose(1, 2), rng, o.sigreg)
            loss = loss + o.slot_coeff * (slot + o.sigreg_coeff * slot_gauss)
            terms |= {"loss_slot": slot, "loss_slot_sigreg": slot_gauss}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def slot_means(self, batch: Batch, rng: StepRng, view: str) -> Tensor:
        """Encode the crops of a view; return the mean token of each time slot, [count, B, slots, D].

        There is a single slot, the whole clip, where the loss does not need them apart.
        """
        grid, by_slot = self.grids[view], self.options.by_slot
        drop = self.options.token_drop
        drop = drop if isinstance(drop, float) else drop[view]
        keep = None
        if drop > 0:
            seeds = rng.clip_seeds(batch, f"token drop {view}", view)
            keep = kept_tokens(seeds, grid, drop, by_slot, batch.views[view].device)
        tokens = self.encoder(to_float(batch.views[view], self.mean, self.std), keep)
        means = rearrange(tokens, "R (t k) D -> R t k D", t=grid.t if by_slot else 1).mean(2)
        return rearrange(means, "(B n) t D -> n B t D", n=self.options.views[view].count)

    def encoders(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}


def kept_tokens(seeds: Sequence[int], grid: Grid, drop: float, by_slot: bool, device: torch.device) -> Tensor:
    """Draw the tokens that are kept of each clip, uniformly at random: sorted indices [clips, K].

    Args:
        seeds: Seed of each clip.
        grid: Token grid of the clips.
        drop: Fraction of the tokens to drop; at least one is kept.
        by_slot: Keep equally many tokens in each time slot, at least one.
        device: Device of the result.
    """
    generator = torch.Generator(device)
    order = torch.stack(
        [torch.rand(grid.num_tokens, generator=generator.manual_seed(seed), device=device) for seed in seeds]
    )
    groups = order.view(len(seeds), grid.t if by_slot else 1, -1)
    size = groups.shape[2]
    kept = groups.argsort(dim=2)[:, :, : max(1, round((1 - drop) * size))].sort(dim=2).values
    return (kept + size * torch.arange(groups.shape[1], device=device)[:, None]).flatten(1)


def build(options: Options, setup: Setup) -> LeVJEPA:
    """Build encoder and projector. Raises ValueError where encoder, views and options do not fit together."""
    setup.num_masks(at_most=0)
    views = {name: view for name, view in options.views.items() if view.count}
    encoder = setup.build_encoder(drop_tokens=True)
    grids = {}
    for name in sorted(views, key=lambda name: name != GLOBAL):  # the global crops first
        try:
            clip = views[name].clip_shape(setup.clip)
            grids[name] = encoder.grid_size(clip.num_frames, clip.height, clip.width)
        except ValueError as error:
            raise ValueError(f"objective.views.{name}: {error}") from None
    if isinstance(options.token_drop, dict) and options.token_drop.keys() != options.views.keys():
        raise ValueError(f"objective.token_drop: give one number, or one for each of {', '.join(options.views)}")
    if options.by_slot and len({grid.t for grid in grids.values()}) > 1:
        raise ValueError("objective.views: projector_input: slots and slot_coeff need the same num_frames in all views")
    if options.slot_coeff and not getattr(encoder, "block_causal", False):
        raise ValueError(
            "objective.slot_coeff: the features of a time slot must not depend on later ones: take an encoder with "
            "encoder.block_causal: true"
        )
    if options.slot_coeff and grids[GLOBAL].t < 2:
        raise ValueError("objective.slot_coeff: the clips have one time slot; raise num_frames or lower tubelet_size")
    return LeVJEPA(encoder, options, grids, mean=setup.mean, std=setup.std)
