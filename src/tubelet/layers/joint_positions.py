"""Positions of the tokens of a clip and of its sound, on one clock."""

import torch
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.layers.coordinates import locate
from tubelet.layers.positions import sincos_1d


class JointPositions(nn.Module):
    """Sin-cos embeddings of video tokens, numbered from 0 to N - 1, and sound tokens, numbered from N on.

    Half of the channels tell the time, for both on one clock, whose unit is the shortest token. The others tell row
    and column of a video token, or the band of a sound token. A learned embedding tells the modality.

    Args:
        embed_dim: Width D of the tokens; a multiple of 8.
        video: Token grid (t, h, w) of the clip.
        sound: Token grid (1, time slots, bands) of its sound, which lasts as long.

    Raises:
        ValueError: If `embed_dim` is not a multiple of 8.
    """

    table: Tensor
    use_rope = False

    def __init__(self, embed_dim: int, video: Grid, sound: Grid):
        super().__init__()
        if embed_dim % 8:
            raise ValueError(f"positions of video and sound need a width that is a multiple of 8, not {embed_dim}")
        half, quarter = embed_dim // 2, embed_dim // 4
        shortest = max(video.t, sound.h)
        seen = locate(torch.arange(video.num_tokens, device="cpu"), video)
        heard = locate(torch.arange(sound.num_tokens, device="cpu"), sound)
        of_video = [
            sincos_1d(half, (seen.t + 0.5) * (shortest / video.t)),
            sincos_1d(quarter, seen.y),
            sincos_1d(quarter, seen.x),
        ]
        of_sound = [sincos_1d(half, (heard.y + 0.5) * (shortest / sound.h)), sincos_1d(half, heard.x)]
        table = torch.cat([torch.cat(of_video, dim=1), torch.cat(of_sound, dim=1)]).float()
        self.register_buffer("table", table, persistent=False)
        self.video_embed = nn.Parameter(torch.zeros(embed_dim))
        self.sound_embed = nn.Parameter(torch.zeros(embed_dim))
        self.num_video = video.num_tokens

    def add(self, x: Tensor, indices: Tensor) -> Tensor:
        """Add the embeddings of the tokens `indices` [B, K] to `x` [B, K, D]."""
        is_sound = (indices >= self.num_video)[..., None]
        return x + self.table[indices] + torch.where(is_sound, self.sound_embed, self.video_embed)

    def rope(self, indices: Tensor) -> None:
        """Return None: there are no rotary positions."""
