"""Several masks of the same clips in one sequence: attention sees each mask by itself, every other layer all tokens.

The tokens of the masks stand one after another, [B, K1 + K2 + …, D]. Linear layers, norms and MLPs then compute one
large product in place of one for each mask, and the weights are read, gathered and differentiated once.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tubelet.layers.attention import AttentionFn


class Segments(NamedTuple):
    """Attention function that lets the tokens of each segment attend among themselves only.

    Args:
        lengths: Number of tokens of each segment; they add up to N.
        functions: Attention function of each segment.
        starts: See `_starts`. Flash attention then computes all segments at once, where it can.
    """

    lengths: tuple[int, ...]
    functions: tuple[AttentionFn, ...]
    starts: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
        """Attend within the segments: q, k, v [B, num_heads, N, head_dim] -> [B, num_heads, N, head_dim]."""
        is_16_bit = q.dtype in (torch.bfloat16, torch.float16)
        if self.starts is not None and is_16_bit and dropout_p == 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
            return self._at_once(q, k, v, self.starts, scale)
        parts = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        pairs = zip(self.functions, parts, strict=True)
        mixed = [attend(*part, dropout_p=dropout_p, scale=scale) for attend, part in pairs]
        # Joined with the tokens before the heads, which is the order in memory here and in the layer that follows.
        return torch.cat([x.transpose(1, 2) for x in mixed], dim=1).transpose(1, 2)

    def _at_once(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None) -> Tensor:
        """As `__call__`, without copies of the segments."""
        flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        longest = max(self.lengths)
        mixed = varlen_attn(flat_q, flat_k, flat_v, starts, starts, longest, longest, scale=scale)
        assert isinstance(mixed, Tensor)  # it returns a tuple only where that is asked for
        return mixed.unflatten(0, (len(q), -1)).transpose(1, 2)


def attend_in_segments(lengths: Sequence[int], functions: Sequence[AttentionFn], x: Tensor) -> AttentionFn:
    """Return the attention function of a sequence of segments, for each of which there is one.

    Args:
        lengths: Number of tokens of each segment.
        functions: Attention function of each segment.
        x: The sequence [B, N, D], for its batch size and device.
    """
    if len(functions) == 1:
        return functions[0]
    plain = all(function is F.scaled_dot_product_attention for function in functions)
    starts = _starts(lengths, len(x), x.device) if plain and _prefers_flash_attention(x.device) else None
    # mypy does not see the __call__ of a NamedTuple.
    return Segments(tuple(lengths), tuple(functions), starts)  # type: ignore[return-value]


def _prefers_flash_attention(device: torch.device) -> bool:
    """Whether flash attention is allowed, and cuDNN not; see `tubelet.runtime.attention_kernels`."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()


def _starts(lengths: Sequence[int], batch_size: int, device: torch.device) -> Tensor:
    """Return where each segment of each clip starts in the flattened sequence, and its end: int32 [B * segments + 1].

    It is computed on the device, as copying it there would wait.
    """
    clips = torch.arange(batch_size, device=device, dtype=torch.int32) * sum(lengths)
    within = itertools.accumulate(lengths[:-1], initial=0)
    starts = torch.stack([clips + start for start in within], dim=1).flatten()
    return F.pad(starts, (0, 1), value=batch_size * sum(lengths))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tokens or masks [B, K_i, ...] along the tokens; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
