"""MixUp and CutMix of torchvision, so that a sample's mixture does not depend on the number of processes."""

import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import v2

from tubelet.runtime.seeds import seed_for


class PairMixing:
    """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019) of the samples 2k and 2k + 1 of a step's global batch.

    Each pair has its own share and box, the same in all its frames. A sample whose partner is missing stays as it is.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int):
        self.num_classes, self.seed = num_classes, seed
        kinds = [kind(alpha=a, num_classes=num_classes) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
        self.mix = v2.RandomChoice(kinds)

    def __call__(self, clips: Tensor, labels: Tensor, step: int, slots: list[int]) -> tuple[Tensor, Tensor]:
        """Float clips [B, n, C, T, H, W], labels [B] -> mixed clips, shares [B, num_classes] of each class.

        slots: the samples' places in the global batch, ascending. Torch's global generator is seeded.
        """
        images = rearrange(clips, "B n C T H W -> B (n C T) H W").clone()
        shares = torch.nn.functional.one_hot(labels, self.num_classes).to(clips.dtype)
        for row, (slot, following) in enumerate(zip(slots, slots[1:], strict=False)):
            if slot % 2 == 0 and following == slot + 1:
                torch.manual_seed(seed_for(self.seed, "mixing", step, slot))
                pair = slice(row, row + 2)
                images[pair], shares[pair] = self.mix(images[pair], labels[pair])
        return images.view_as(clips), shares
