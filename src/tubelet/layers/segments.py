"""Several masks of the same clips in one sequence: attention sees each mask by itself, every other layer all tokens.

The tokens of the masks stand one after another, [B, K1 + K2 + …, D]. Linear layers, norms and MLPs then compute one
large product in place of one for each mask, and the weights are read, gathered and differentiated once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tubelet.layers.attention import AttentionFn


class Segments(NamedTuple):
    """Attention function that lets the tokens of each segment attend among themselves only.

    Args:
        lengths: Number of tokens of each segment; they add up to N.
        functions: Attention function of each segment.
    """

    lengths: tuple[int, ...]
    functions: tuple[AttentionFn, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attend within the segments: q, k, v [B, num_heads, N, head_dim] -> [B, num_heads, N, head_dim]."""
        parts = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        mixed = [attend(*part, **options) for attend, part in zip(self.functions, parts, strict=True)]
        # Joined with the tokens before the heads, which is the order in memory here and in the layer that follows.
        return torch.cat([x.transpose(1, 2) for x in mixed], dim=1).transpose(1, 2)


def attend_in_segments(lengths: Sequence[int], functions: Sequence[AttentionFn]) -> AttentionFn:
    """Return the attention function of a sequence of segments, for each of which there is one."""
    if len(functions) == 1:
        return functions[0]
    # mypy does not see the __call__ of a NamedTuple.
    return Segments(tuple(lengths), tuple(functions))  # type: ignore[return-value]


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tokens or masks [B, K_i, ...] along the tokens; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
