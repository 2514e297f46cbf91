"""Contrastive loss of pairs (CLIP, Radford et al. 2021), with the other pairs of all processes as negatives."""

import math

import torch
from torch import Tensor, nn

from tubelet.objectives.losses.distributed import all_gather_with_grad

MAX_LOGIT_SCALE = 100.0
"""Largest inverse temperature, as in CLIP."""


class ContrastiveLoss(nn.Module):
    """Cross-entropy of finding the partner of each item among those of the batch, in both directions.

    Args:
        temperature: Initial temperature, which is learned.
    """

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        # [1] and not a scalar, which FSDP2 cannot shard
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / temperature)]))

    @property
    def temperature(self) -> Tensor:
        """The learned temperature, a detached scalar."""
        return (-self.log_scale[0]).exp().detach()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the mean of both directions' losses over the pairs of all processes.

        Args:
            first: Embeddings [B, D], of any length.
            second: Those of their partners [B, D].
        """
        with torch.autocast(first.device.type, enabled=False):
            first, second = (all_gather_with_grad(nn.functional.normalize(x.float(), dim=-1)) for x in (first, second))
            scale = self.log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
            logits = scale * first @ second.T
            target = torch.arange(len(logits), device=logits.device)
            cross_entropy = nn.functional.cross_entropy
            return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
