"""Fusion of modalities: tokens of video and sound attend to each other, and a head reads them."""

import torch
from torch import Tensor, nn

from tubelet.layers import CrossAttentionBlock
from tubelet.layers.init import init_weights
from tubelet.layers.positions import sincos_1d
from tubelet.models.attentive_pooler import AttentivePooler


class Fusion(nn.Module):
    """Read tokens of several modalities, which attend to each other, into one vector.

    The tokens of all modalities get embeddings of their modality and of their time in the clip, on one clock. In each
    block the tokens of each modality attend to those of the others; where there is one modality, to each other. A
    learned query attends to all of them in the end.

    Args:
        widths: Modality -> width of its tokens.
        times: Modality -> seconds from the beginning of the clip to the middle of each token [N].
        embed_dim: Width D of the blocks.
        num_heads: Attention heads.
        depth: Number of blocks.
        num_outputs: Length of the result.
    """

    def __init__(
        self,
        widths: dict[str, int],
        times: dict[str, Tensor],
        embed_dim: int,
        num_heads: int,
        depth: int,
        num_outputs: int,
    ):
        super().__init__()
        self.modalities = tuple(widths)
        self.inputs = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim)) for name, width in widths.items()}
        )
        self.modality = nn.ParameterDict({name: nn.Parameter(torch.zeros(embed_dim)) for name in widths})
        unit = min(float(t.unique().diff().min()) for t in times.values() if len(t.unique()) > 1)
        for name, seconds in times.items():
            self.register_buffer(f"time_{name}", sincos_1d(embed_dim, seconds / unit).float(), persistent=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: CrossAttentionBlock(embed_dim, num_heads, qkv_bias=True) for name in widths})
            for _ in range(depth)
        )
        std = embed_dim**-0.5  # these layers are narrow and few: 0.02, for encoders, would let them learn slowly
        self.pooler = AttentivePooler(1, embed_dim, num_heads, init_std=std)
        init_weights(self.inputs, std)
        init_weights(self.blocks, std)
        self.head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_outputs))

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Map tokens [B, N, D'] of each modality to [B, num_outputs]."""
        x = {
            name: self.inputs[name](tokens[name]) + self.modality[name] + getattr(self, f"time_{name}")
            for name in self.modalities
        }
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            others = {
                name: torch.cat([x[other] for other in self.modalities if other != name or len(x) == 1], 1)
                for name in self.modalities
            }
            x = {name: block[name](x[name], others[name]) for name in self.modalities}
        return self.head(self.pooler(torch.cat(list(x.values()), 1))[:, 0])
