"""Three ways to mix tokens behind one interface: additive attention, random features, softmax.

`FastAttention` (Fastformer) and `PerformerAttention` (FAVOR+) cost time in proportion to the number of tokens,
`RegularAttention` to its square.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tubelet.layers.checks import head_width
from tubelet.layers.groups import Groups
from tubelet.layers.positions import RopeTables, rotate

# Performer's queries whose random features a CPU's cache holds: twice as fast as all of many thousands.
_QUERIES_AT_ONCE = 1024


class MixingLayer(nn.Module):
    """Tokens [B, N, D] -> [B, N, D]; `mix` is what the mechanisms differ in.

    Queries and keys are turned by `rope` where given. With `groups`, tokens are mixed within these groups.
    Raises ValueError when `num_heads` does not divide `dim`.
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
        q, k, v = self.project(x, rope)
        return self.proj_drop(self.proj(self.attend(q, k, v, groups)))

    def project(self, x: torch.Tensor, rope: RopeTables | None) -> Sequence[torch.Tensor]:
        """Queries, keys and values, each [B, N, heads, head width]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if rope is None:
            return qkv.unbind(2)
        return *rotate(qkv[:, :, :2], rope).unbind(2), qkv[:, :, 2]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups | None) -> torch.Tensor:
        """[B, N, heads * head width] from queries, keys and values [B, N, heads, head width]."""
        if groups is None:
            return self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None).transpose(1, 2).flatten(2)
        return groups.merge(self.mix(groups.split(q), groups.split(k), groups.split(v), groups.mask())).flatten(2)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[G, heads, n, head width]; keys where `mask` [G, 1, 1, n] is False count for nothing."""
        raise NotImplementedError


class RegularAttention(MixingLayer):
    """Softmax attention, quadratic in the number of tokens; `attn_drop` acts on its weights in training.

    Heads are `head_dim` wide, `dim / num_heads` if None.

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
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.attn_drop if self.training else 0.0
        )


class FastAttention(MixingLayer):
    """Additive attention of Fastformer (Wu et al. 2021, "Additive Attention Can Be All You Need", section 3.1).

    In each head, over tokens i: the global query q = sum α_i q_i, with α the softmax of w_q·q_i / sqrt(d) (equations 3,
    4); p_i = q * k_i; the global key k = sum β_i p_i, with β the softmax of w_k·p_i / sqrt(d) (equations 5, 6); and
    u_i = k * v_i. The output is a linear map of u_i plus q_i. Values share the queries' weights, as in the paper.
    Rotary positions, which the paper has not, turn queries and keys wherever weights or sums are formed.

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
        # A sum weighted by a softmax of w·q_i / sqrt(d) is the attention of the one query w over the q_i. So is that of
        # the p_i = global_query * k_i, whose common factor goes to the query and the result instead.
        query_weight = self.query_weight.to(q.dtype).expand(len(q), -1, -1, -1)
        global_query = F.scaled_dot_product_attention(query_weight, q, q, attn_mask=mask)
        key_weight = self.key_weight.to(q.dtype) * global_query
        global_key = global_query * F.scaled_dot_product_attention(key_weight, k, k, attn_mask=mask)
        return global_key * v


class PerformerAttention(MixingLayer):
    """Softmax attention approximated by FAVOR+ (Choromanski et al. 2021), linear in the number of tokens.

    The kernel exp(q·k / sqrt(d)) is the mean over random w of exp(w·q' - |q'|²/2) exp(w·k' - |k'|²/2), where
    q' = q / d^¼ and k' = k / d^¼ (lemma 1: positive features). The `num_features` vectors w, d ln d by default, are
    orthogonal in blocks of d (section 2.4) and saved with the weights; `redraw_features` draws others (section 4).

    Nothing is added to the features to keep them finite. With the largest exponent taken out over the tokens, and a
    softmax over the features, the quotient of the paper's equation 4 can neither overflow nor divide by zero, and stays
    exact.

    >>> PerformerAttention(dim=64)(torch.randn(16, 32, 64)).shape
    torch.Size([16, 32, 64])
    """

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
            raise ValueError(f"num_features {num_features}: Performer needs at least one; leave it out for d ln d")
        self.register_buffer("features", orthogonal_features(num_features, self.head_dim))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_features={len(self.features)}"

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, on the CPU, so that a seed gives the same ones on every device."""
        self.features.copy_(orthogonal_features(*self.features.shape, generator))

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        w = self.features.to(q.dtype) * scale**0.5
        # With s_fj = w_f·k'_j - |k'_j|²/2 and z_f = sum_j exp s_fj, equation 4 reads
        # out_i = sum_f exp(w_f·q'_i) z_f latent_f / sum_f exp(w_f·q'_i) z_f, latent_f = sum_j exp(s_fj) v_j / z_f.
        # The factor exp(-|q'_i|²/2) cancels. One more channel, 1 in w and v, gives norm and z_f in the same products.
        half_norm = (scale / 2) * k.square().sum(dim=-1, keepdim=True)
        s = F.pad(w, (0, 1), value=1.0) @ torch.cat([k, -half_norm], dim=-1).mT
        if mask is not None:
            s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
        largest = s.detach().amax(dim=-1, keepdim=True)
        latent, z = (s.sub_(largest).exp_() @ F.pad(v, (0, 1), value=1.0)).split([v.shape[-1], 1], dim=-1)
        latent, log_z = latent / z, (largest + z.log()).mT
        parts = q.split(_QUERIES_AT_ONCE if q.device.type == "cpu" else q.shape[2], dim=2)
        return torch.cat([(part @ w.mT + log_z).softmax(dim=-1) @ latent for part in parts], dim=2)


MECHANISMS = {"fastformer": FastAttention, "performer": PerformerAttention, "regular": RegularAttention}


def orthogonal_features(num_features: int, dim: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gaussian vectors [num_features, dim] that are orthogonal within each block of `dim`, with independent lengths."""
    blocks = math.ceil(num_features / dim)
    # On the CPU even while a model is built on the meta device.
    gaussians = torch.randn(blocks, dim, dim, generator=generator, device="cpu")
    q, r = torch.linalg.qr(gaussians)
    # Only with a positive diagonal of r is q uniform among the rotations (Mezzadri 2007).
    directions = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).flatten(0, 1)[:num_features]
    lengths = torch.randn(num_features, dim, generator=generator, device="cpu").norm(dim=1, keepdim=True)
    return directions * lengths
