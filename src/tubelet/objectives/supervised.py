"""Supervised classification: cross-entropy of a head on the encoder's tokens, both trained."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import v2

from tubelet.data import Batch, to_float
from tubelet.models.interfaces import Encoder
from tubelet.objectives import Setup
from tubelet.probing import heads
from tubelet.runtime.seeds import seed_for
from tubelet.training.objective import Objective, ObjectiveOptions, StepRng
from tubelet.training.optimizer import layer_decay


class Options(ObjectiveOptions):
    """YAML section `objective` with `name: supervised`."""

    name: str = "supervised"
    num_classes: int = Field(ge=2)
    """Number of classes."""
    head: heads.TrainedHeadOptions = Field({}, validate_default=True)
    """What classifies the tokens of the encoder."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the cross-entropy."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each block of the encoder to the one below it; see `optimizer.layer_decay`."""


class Supervised(Objective):
    """Encoder and head, trained with class labels.

    Args:
        encoder: Maps clips [B, C, T, H, W] to tokens [B, N, D].
        head: Maps tokens [B, N, D] to logits [B, num_classes].
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
        segments: Clips of a video from different times; a batch holds `segments` clips of each video.
        attend_across_segments: Make one prediction from the tokens of all segments; false: average the predictions.
        label_smoothing: Label smoothing of the cross-entropy.
        layer_decay: Factor on the learning rate from each block of the encoder to the one below it.
        mixing: MixUp and CutMix; None for none.
    """

    fixed_targets = True

    def __init__(
        self,
        encoder: Encoder,
        head: heads.Head,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        segments: int = 1,
        attend_across_segments: bool = True,
        label_smoothing: float = 0.0,
        layer_decay: float = 1.0,
        mixing: "PairMixing | None" = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.heads = heads.Heads([head])
        self.mean, self.std = mean, std
        self.segments, self.attend_across_segments = segments, attend_across_segments
        self.label_smoothing, self.layer_decay, self.mixing = label_smoothing, layer_decay, mixing

    def prepare_batch(self, batch: Batch, rng: StepRng) -> Batch:
        """Normalize the clips and mix pairs of samples."""
        clips, target = to_float(batch.clips, self.mean, self.std), batch.labels
        if self.mixing is not None:
            positions = batch.targets["position"]  # on the host: each pair is mixed by itself
            assert isinstance(positions, tuple)
            if positions:
                clips, target = self.mixing(clips, batch.labels, rng.step, positions)
        return dataclasses.replace(batch, views={"clip": clips}, targets={"label": batch.labels, "mixed": target})

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the cross-entropy `loss` and `train_top1` in percent, averaged over the samples."""
        logits = self.logits(batch.clips, len(batch))
        loss = heads.loss(logits[None], batch.tensor("mixed"), self.label_smoothing).sum()
        hits = heads.probabilities(logits.detach()[None])[0].argmax(-1) == batch.labels
        return {"loss": loss, "train_top1": 100 * hits.float().mean()}

    def logits(self, clips: Tensor, num_samples: int) -> Tensor:
        """Return the logits [B, P, num_classes] of P predictions a video of B · segments · views normalized clips."""
        tokens = rearrange(self.encoder(clips), "(B s v) N D -> B s v N D", B=num_samples, s=self.segments)
        return heads.read_out(self.heads, tokens, self.attend_across_segments)[0]

    def lr_scales(self) -> Mapping[nn.Parameter, float]:
        """Return the layer-wise factors on the learning rate; ValueError where the encoder has no blocks."""
        return layer_decay(self.encoder, self.layer_decay) if self.layer_decay < 1 else {}

    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "classifier": self.heads.heads[0]}

    def encoders(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}


class PairMixing:
    """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019) of the samples 2k and 2k + 1 of a step's global batch.

    Each pair has its own mixing weight and box, the same in all its frames, which do not depend on the number of
    processes. A sample without a partner stays as it is.

    Args:
        mixup: Parameter of MixUp's beta distribution; 0 for none.
        cutmix: Parameter of CutMix's beta distribution; 0 for none. With both, one of the two at random for each pair.
        num_classes: Number of classes.
        seed: Seed of the run.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int):
        self.num_classes, self.seed = num_classes, seed
        kinds = [kind(alpha=a, num_classes=num_classes) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
        self.mix = v2.RandomChoice(kinds)

    def __call__(self, clips: Tensor, labels: Tensor, step: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mix the pairs of a local batch.

        Args:
            clips: Float clips [B · n, C, T, H, W], n of each sample.
            labels: Classes [B].
            step: Step number.
            positions: Positions of the samples in the global batch, ascending.

        Returns:
            Mixed clips, and the probability of each class [B, num_classes].
        """
        images = rearrange(clips, "(B n) C T H W -> B (n C T) H W", B=len(labels)).clone()
        target = nn.functional.one_hot(labels.clamp_min(0), self.num_classes).to(clips.dtype)
        for row, (position, following) in enumerate(zip(positions, positions[1:], strict=False)):
            if position % 2 == 0 and following == position + 1:
                torch.manual_seed(seed_for(self.seed, "mixing", step, position))
                pair = slice(row, row + 2)
                images[pair], target[pair] = self.mix(images[pair], labels[pair])
        return images.view_as(clips), target


def build(options: Options, setup: Setup) -> Supervised:
    """Build encoder and head. Raises ValueError where they do not fit the clips, or where there are masks."""
    setup.num_masks(at_most=0)
    encoder = setup.build_encoder(drop_tokens=False)
    grid = encoder.grid_size(setup.clip.num_frames, setup.clip.height, setup.clip.width)
    return Supervised(
        encoder,
        heads.build_head(options.head, encoder, options.num_classes, num_slots=grid.t),
        mean=setup.mean,
        std=setup.std,
        label_smoothing=options.label_smoothing,
        layer_decay=options.layer_decay,
    )
