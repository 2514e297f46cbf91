"""Building blocks of the encoders, predictors and probes; they know torch and nothing else of this package."""

from tubelet.layers.attention import Attention, CrossAttention
from tubelet.layers.block import Block, CrossAttentionBlock
from tubelet.layers.mlp import MLP, SwiGLU
from tubelet.layers.patch_embed import PatchEmbed, PatchEmbed3D

__all__ = ["MLP", "Attention", "Block", "CrossAttention", "CrossAttentionBlock", "PatchEmbed", "PatchEmbed3D", "SwiGLU"]
