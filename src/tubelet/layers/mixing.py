"""Token mixing layers with one interface: additive attention, random features and softmax attention.

`FastAttention` (Fastformer) and `PerformerAttention` (FAVOR+) are linear in the number of tokens, `RegularAttention` is
quadratic.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tubelet.layers.attention import attention
from tubelet.layers.checks import head_width
from tubelet.layers.groups import Groups
from tubelet.layers.rope import RopeTables, rotate

# Queries per chunk of Performer on the CPU: their random features fit in the cache, which is twice as fast as computing
# many thousands at once.
_QUERY_CHUNK_SIZE = 1024


class MixingLayer(nn.Module):
    """Base class of token mixing layers, [B, N, D] -> [B, N, D]. Subclasses implement `mix`.

    Args:
        dim: Width D of the tokens.
        num_heads: Number of heads; must divide `dim` unless `head_dim` is given.
        qkv_bias: Add a learnable bias to queries, keys and values.
        proj_drop: Dropout probability of the output.
        head_dim: Channels per head; `dim / num_heads` if None.
        parts: Number of projections of the tokens: 3 for queries, keys and values.

    Raises:
        ValueError: If `num_heads` does not divide `dim` and `head_dim` is None.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        proj_drop: float,
        head_dim: int | None = None,
        parts: int = 3,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width(dim, num_heads) if head_dim is None else head_dim
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, inner * parts, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def forward(self, x: torch.Tensor, rope: RopeTables | None = None, groups: Groups | None = None) -> torch.Tensor:
        """Mix the tokens.

        Args:
            x: Tokens [B, N, D].
            rope: Rotary tables of the tokens, applied to queries and keys; no rotation if None.
            groups: Partition of the tokens; they are mixed within each group. All tokens form one group if None.

        Returns:
            Tokens [B, N, D].
        """
        q, k, v = self.project(x, rope)
        return self.proj_drop(self.proj(self.attend(q, k, v, groups)))

    def project(self, x: torch.Tensor, rope: RopeTables | None) -> Sequence[torch.Tensor]:
        """Return queries, keys and values, each [B, N, heads, head_dim]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if rope is None:
            return qkv.unbind(2)
        return *rotate(qkv[:, :, :2], rope).unbind(2), qkv[:, :, 2]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups | None) -> torch.Tensor:
        """Mix queries, keys and values [B, N, heads, head_dim] -> [B, N, heads * head_dim]."""
        if groups is None:
            return self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None).transpose(1, 2).flatten(2)
        return groups.merge(self.mix(groups.split(q), groups.split(k), groups.split(v), groups.mask())).flatten(2)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Mix n tokens of each of G groups.

        Args:
            q: Queries [G, heads, n, head_dim].
            k: Keys of the same shape.
            v: Values of the same shape.
            mask: Bool [G, 1, 1, n]; keys where it is False are ignored. None keeps all keys.

        Returns:
            Mixed values [G, heads, n, head_dim].
        """
        raise NotImplementedError


class RegularAttention(MixingLayer):
    """Softmax attention, quadratic in the number of tokens.

    Args:
        dim: Width D of the tokens.
        num_heads: Number of heads; must divide `dim` unless `head_dim` is given.
        qkv_bias: Add a learnable bias to queries, keys and values.
        proj_drop: Dropout probability of the output.
        attn_drop: Dropout probability of the attention weights.
        head_dim: Channels per head; `dim / num_heads` if None.

    Example:
        >>> RegularAttention(dim=64)(torch.randn(16, 32, 64)).shape
        torch.Size([16, 32, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        head_dim: int | None = None,
    ):
        super().__init__(dim, num_heads, qkv_bias, proj_drop, head_dim)
        self.attn_drop = attn_drop

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return attention(q, k, v, attn_mask=mask, dropout_p=self.attn_drop if self.training else 0.0)


class FastAttention(MixingLayer):
    """Additive attention, linear in the number of tokens: "Fastformer" (Wu et al. 2021), section 3.1.

    For the tokens i of each head:

    - global query q = sum_i α_i q_i, where α is the softmax of w_q·q_i / sqrt(d) (equations 3, 4);
    - p_i = q * k_i, and global key k = sum_i β_i p_i, where β is the softmax of w_k·p_i / sqrt(d) (equations 5, 6);
    - u_i = k * v_i; the output is a linear map of u_i plus q_i.

    As in the paper, values share the weights of the queries. Rotary positions, which the paper does not use, rotate the
    queries and keys that enter weights and sums, but not the values.

    Args:
        dim: Width D of the tokens.
        num_heads: Number of heads; must divide `dim`.
        qkv_bias: Add a learnable bias to queries and keys.
        proj_drop: Dropout probability of the output.

    Example:
        >>> FastAttention(dim=64)(torch.randn(16, 32, 64)).shape
        torch.Size([16, 32, 64])
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, proj_drop: float = 0.0):
        super().__init__(dim, num_heads, qkv_bias, proj_drop, parts=2)
        self.query_weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 1, self.head_dim)))
        self.key_weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 1, self.head_dim)))

    def forward(self, x: torch.Tensor, rope: RopeTables | None = None, groups: Groups | None = None) -> torch.Tensor:
        q, k, v = self.project(x, rope)
        return self.proj_drop(self.proj(self.attend(q, k, v, groups)) + v.flatten(2))

    def project(self, x: torch.Tensor, rope: RopeTables | None) -> Sequence[torch.Tensor]:
        qk = self.qkv(x).unflatten(-1, (2, self.num_heads, self.head_dim))
        return *(qk if rope is None else rotate(qk, rope)).unbind(2), qk[:, :, 0]

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # A sum weighted by the softmax of w·q_i / sqrt(d) is the attention of a single query w to the q_i. The same
        # holds for p_i = global_query * k_i, whose common factor moves to the query and to the result.
        query_weight = self.query_weight.to(q.dtype).expand(len(q), -1, -1, -1)
        global_query = attention(query_weight, q, q, attn_mask=mask)
        key_weight = self.key_weight.to(q.dtype) * global_query
        global_key = global_query * attention(key_weight, k, k, attn_mask=mask)
        return global_key * v


class PerformerAttention(MixingLayer):
    """FAVOR+ approximation of softmax attention, linear in the number of tokens: "Performer" (Choromanski et al. 2021).

    The kernel exp(q·k / sqrt(d)) is the mean over random vectors w of exp(w·q' - |q'|²/2) exp(w·k' - |k'|²/2), where
    q' = q / d^¼ and k' = k / d^¼ (lemma 1, positive features). The vectors w are orthogonal in blocks of d (section
    2.4) and saved with the weights; `redraw_features` draws new ones (section 4).

    No epsilon is added for numerical stability. Subtracting the largest exponent over the tokens and a softmax over the
    features compute the quotient of equation 4 exactly, without overflow or division by zero.

    Args:
        dim: Width D of the tokens.
        num_heads: Number of heads; must divide `dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        proj_drop: Dropout probability of the output.
        num_features: Number of random features; d ln d for heads of d channels if None.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, or `num_features` is less than 1.

    Example:
        >>> PerformerAttention(dim=64)(torch.randn(16, 32, 64)).shape
        torch.Size([16, 32, 64])
    """

    features: torch.Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        num_features: int | None = None,
    ):
        super().__init__(dim, num_heads, qkv_bias, proj_drop)
        if num_features is None:
            num_features = max(self.head_dim, int(self.head_dim * math.log(self.head_dim)))
        if num_features < 1:
            raise ValueError(f"num_features {num_features}: Performer needs at least one; remove it for d ln d")
        self.register_buffer("features", orthogonal_features(num_features, self.head_dim))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_features={len(self.features)}"

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, on the CPU so that a seed gives the same ones on every device."""
        num_features, dim = self.features.shape
        self.features.copy_(orthogonal_features(num_features, dim, generator))

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        w = self.features.to(q.dtype) * scale**0.5
        # With s_fj = w_f·k'_j - |k'_j|²/2 and z_f = sum_j exp s_fj, equation 4 reads
        # out_i = sum_f exp(w_f·q'_i) z_f latent_f / sum_f exp(w_f·q'_i) z_f, latent_f = sum_j exp(s_fj) v_j / z_f.
        # The factor exp(-|q'_i|²/2) cancels. An extra channel of ones in w and v yields the norm and z_f with the same
        # matrix products.
        half_norm = (scale / 2) * k.square().sum(dim=-1, keepdim=True)
        s = F.pad(w, (0, 1), value=1.0) @ torch.cat([k, -half_norm], dim=-1).mT
        if mask is not None:
            s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
        largest = s.detach().amax(dim=-1, keepdim=True)
        latent, z = (s.sub_(largest).exp_() @ F.pad(v, (0, 1), value=1.0)).split([v.shape[-1], 1], dim=-1)
        latent, log_z = latent / z, (largest + z.log()).mT
        parts = q.split(_QUERY_CHUNK_SIZE if q.device.type == "cpu" else q.shape[2], dim=2)
        return torch.cat([(part @ w.mT + log_z).softmax(dim=-1) @ latent for part in parts], dim=2)


MECHANISMS = {"fastformer": FastAttention, "performer": PerformerAttention, "regular": RegularAttention}


def orthogonal_features(num_features: int, dim: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw Gaussian vectors [num_features, dim] that are orthogonal within each block of `dim` vectors.

    Their lengths are independent and distributed as those of Gaussian vectors.
    """
    blocks = math.ceil(num_features / dim)
    # On the CPU even if the model is built on the meta device, because the buffer needs values.
    gaussians = torch.randn(blocks, dim, dim, generator=generator, device="cpu")
    q, r = torch.linalg.qr(gaussians)
    # q is uniformly distributed only if the diagonal of r is positive (Mezzadri 2007).
    directions = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).flatten(0, 1)[:num_features]
    lengths = torch.randn(num_features, dim, generator=generator, device="cpu").norm(dim=1, keepdim=True)
    return directions * lengths
