"""Contrastive loss of pairs (CLIP, Radford et al. 2021), with the other pairs of all processes as negatives."""

import math

import torch
from torch import Tensor, nn

from tubelet.objectives.losses.distributed import all_gather_with_grad

MAX_LOGIT_SCALE = 100.0
"""Largest inverse temperature, as in CLIP."""


class ContrastiveLoss(nn.Module):
    """Cross-entropy of finding the partner of each item among those of the batch, in both directions.

    An item may be in several pairs: a video with several texts, a text of several videos. Where `numbers` tell which
    items are equal, the partners that an item has in other pairs are no negatives, as the other positives of SINCERE
    (Feeney and Hughes 2023, arXiv:2309.14277; false negative elimination in Huynh et al. 2022, arXiv:2011.11765).

    The alternative, targets that are uniform over all partners (UniCL, Yang et al. 2022, arXiv:2204.03610), would
    hardly change the loss: where equal items have equal embeddings, that is up to dropout and augmentation, the mean
    over their pairs amounts to such targets already. They lower the similarity of those of k partners whose
    probability exceeds 1 / k.

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

    def forward(self, first: Tensor, second: Tensor, numbers: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the mean of both directions' losses over the pairs of all processes.

        Args:
            first: Embeddings [B, D], of any length.
            second: Those of their partners [B, D].
            numbers: For the items of either, int64 [B], which are equal for equal items, also across processes; None
                where each item is in one pair only.
        """
        with torch.autocast(first.device.type, enabled=False):
            first, second = (all_gather_with_grad(nn.functional.normalize(x.float(), dim=-1)) for x in (first, second))
            scale = self.log_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
            logits = scale * first @ second.T
            if numbers is not None:
                gathered = all_gather_with_grad(torch.stack(numbers, dim=1))
                logits = logits.masked_fill(_partners_elsewhere(*gathered.unbind(1)), -math.inf)
            target = torch.arange(len(logits), device=logits.device)
            cross_entropy = nn.functional.cross_entropy
            return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def _partners_elsewhere(first: Tensor, second: Tensor) -> Tensor:
    """Return whether item i of the first is also a partner of item j of the second, bool [N, N], False for i = j.

    It is not enough that either number is that of pair i or j: with the pairs (a, x), (a, y) and (b, x), the items a of
    the second and x of the third are partners because of the first.

    Args:
        first: Numbers of the items, int64 [N].
        second: Numbers of their partners [N].
    """
    # the first position of an equal number in place of the number, which is below N
    rows, columns = ((x[:, None] == x).int().argmax(1) for x in (first, second))
    paired = torch.zeros(len(first), len(first), dtype=torch.bool, device=first.device)
    paired[rows, columns] = True
    return paired[rows][:, columns].fill_diagonal_(False)
