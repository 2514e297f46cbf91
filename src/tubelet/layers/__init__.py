"""Building blocks of encoders, predictors and probes. They depend on torch and on no other part of this package."""

from tubelet.layers.attention import Attention, CrossAttention
from tubelet.layers.block import Block, CrossAttentionBlock
from tubelet.layers.mlp import MLP, SwiGLU
from tubelet.layers.patch_embed import PatchEmbed, PatchEmbed3D

__all__ = ["MLP", "Attention", "Block", "CrossAttention", "CrossAttentionBlock", "PatchEmbed", "PatchEmbed3D", "SwiGLU"]
