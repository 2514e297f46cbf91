"""Tell the shift between two modalities from the correlation of their features over the difference in time."""

import torch
from torch import Tensor, nn

from tubelet.layers.init import init_weights


class LagCorrelation(nn.Module):
    """Map tokens of video and sound to the logits of shifts.

    The tokens of each modality are projected and averaged in each time slot, and lose their mean over time. The
    products of all slots of the one with all slots of the other are averaged over pairs with the same difference in
    time, the lag, for each of `num_heads` parts of the channels. A linear layer reads these correlations.

    Args:
        widths: Modality -> width of its tokens, of `video` and `sound`.
        times: Modality -> seconds from the beginning of the clip to the middle of each token [N], slot by slot.
        embed_dim: Width of the projections.
        num_heads: Number of correlations at each lag; must divide `embed_dim`.
        max_lag: Largest lag, in seconds.
        num_outputs: Number of shifts.
    """

    lags: Tensor

    def __init__(
        self,
        widths: dict[str, int],
        times: dict[str, Tensor],
        embed_dim: int,
        num_heads: int,
        max_lag: float,
        num_outputs: int,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.num_heads = num_heads
        self.inputs = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim)) for name, width in widths.items()}
        )
        slots = {name: seconds.unique() for name, seconds in times.items()}
        self.num_slots = {name: len(seconds) for name, seconds in slots.items()}
        self.register_buffer("lags", lag_averages(slots["video"], slots["sound"], max_lag), persistent=False)
        self.head = nn.Linear(num_heads * len(self.lags), num_outputs)
        init_weights(self.inputs, embed_dim**-0.5)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Map tokens [B, N, D] of `video` and `sound` to logits [B, num_outputs]."""
        video, sound = (self._features(name, tokens[name]) for name in ("video", "sound"))
        products = torch.einsum("bthd,buhd->bhtu", video, sound) / video.shape[-1] ** 0.5
        return self.head((products.flatten(2) @ self.lags.T).flatten(1))

    def _features(self, name: str, tokens: Tensor) -> Tensor:
        """Return the features of each slot, without their mean over time [B, slots, heads, channels]."""
        slots = self.inputs[name](tokens).unflatten(1, (self.num_slots[name], -1)).mean(2)
        return (slots - slots.mean(1, keepdim=True)).unflatten(-1, (self.num_heads, -1))


def lag_averages(video: Tensor, sound: Tensor, max_lag: float) -> Tensor:
    """Return the matrix [lags, T * U] that averages over pairs of T and U times with the same difference.

    Differences video - sound are rounded to multiples of the shorter distance between times, up to `max_lag`.
    """
    step = min(float(video.diff().min()), float(sound.diff().min()))
    number = ((video[:, None] - sound) / step).round().long().flatten()
    most = round(max_lag / step)
    pairs = (number == torch.arange(-most, most + 1)[:, None]).float()
    pairs = pairs[pairs.any(1)]  # slots of different lengths leave lags out
    return pairs / pairs.sum(1, keepdim=True)
