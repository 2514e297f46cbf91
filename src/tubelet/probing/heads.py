"""Many independent read-out heads trained at once on one pass of the frozen features."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from tubelet.layers.block import CrossAttentionBlock
from tubelet.models.attentive_pooler import AttentiveClassifier, AttentivePooler
from tubelet.probing.options import ClassifierConfig
from tubelet.runtime.seeds import seed_for


class LinearHead(nn.Module):
    """Linear read-out of the mean token, standardised with the training set's `mean` and `std` [D] of it."""

    def __init__(self, mean: Tensor, std: Tensor, num_classes: int):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clamp_min(1e-6))
        self.linear = nn.Linear(len(mean), num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, D] -> logits [B, num_classes]."""
        return self.linear((tokens.mean(1) - self.mean) / self.std)


class Heads(nn.Module):
    """G heads that read the same tokens. Their losses are summed, so that each gets the gradient it would get alone."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, D] -> logits [G, B, num_classes]."""
        if all(_is_one_cross_attention(head) for head in self.heads):
            pooled = pool_together([head.pooler for head in self.heads], tokens)
            return torch.stack([head.linear(x[:, 0]) for head, x in zip(self.heads, pooled, strict=True)])
        return torch.stack([head(tokens) for head in self.heads])


def attentive(options: ClassifierConfig, encoder: nn.Module, num_classes: int) -> AttentiveClassifier:
    """The head of the section `classifier` that reads the tokens of `encoder`."""
    return AttentiveClassifier(
        embed_dim=encoder.embed_dim,
        num_heads=options.num_heads or encoder.num_heads,
        depth=options.num_probe_blocks,
        num_classes=num_classes,
    )


def build(make: Callable[[], nn.Module], count: int, seed: int) -> Heads:
    """`count` heads of `make()` that start from the same weights, a function of `seed`."""

    def head() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "head"))
            return make()

    return Heads([head() for _ in range(count)])


def loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each head [G], from logits [G, B, P, num_classes] of P predictions a video.

    labels: classes [B], or the shares of each class [B, num_classes].
    """
    G, _, P, _ = logits.shape
    targets = labels.repeat_interleave(P, dim=0)
    targets = torch.cat([targets] * G)
    each = F.cross_entropy(logits.float().flatten(0, 2), targets, reduction="none", label_smoothing=label_smoothing)
    return each.view(G, -1).mean(1)


def probabilities(logits: Tensor) -> Tensor:
    """Probabilities [G, B, num_classes]: the mean over a video's P predictions of logits [G, B, P, num_classes]."""
    return logits.float().softmax(-1).mean(2)


def read_out(heads: Heads, tokens: Tensor, attend_across_segments: bool) -> Tensor:
    """Logits [G, B, P, num_classes] of tokens [B, segments, views, N, D].

    Attending across segments, a prediction is made for each view from the tokens of all its segments, one after
    another as in V-JEPA (P = views); otherwise for each segment and view (P = segments · views).
    """
    if attend_across_segments:
        flat = rearrange(tokens, "B s v N D -> (B v) (s N) D")
    else:
        flat = rearrange(tokens, "B s v N D -> (B s v) N D")
    return rearrange(heads(flat), "G (B P) c -> G B P c", B=len(tokens))


def pool_together(poolers: Sequence[AttentivePooler], tokens: Tensor) -> list[Tensor]:
    """The outputs [B, Q, D] of G one-block poolers on the same tokens [B, N, D], touching each token only once.

    The queries of a pooler are learned and the same for all videos, so the key projection can be moved to their side,
    q·(W_k x) = (W_kᵀq)·x, and the value projection behind the weighted sum, Σ a (W_v x) = W_v Σ a x; scale and shift
    of the norm before them go the same way. A bias of the keys adds the same to all of a query's logits and cancels.
    For N tokens of width D and H heads this takes N·D·H multiplications instead of 2·N·D·D.
    """
    width = tokens.shape[-1]
    unit = F.layer_norm(tokens, (width,), eps=poolers[0].cross_attention_block.norm1.eps)
    moved = torch.cat([_queries_before_keys(pooler) for pooler in poolers])
    attention = (moved @ unit.mT).softmax(-1)
    mixed = attention @ unit
    each = mixed.chunk(len(poolers), dim=1)
    return [_after_attention(pooler, x) for pooler, x in zip(poolers, each, strict=True)]


def _is_one_cross_attention(head: nn.Module) -> bool:
    if not isinstance(head, AttentiveClassifier):
        return False
    return isinstance(head.pooler.cross_attention_block, CrossAttentionBlock) and not head.pooler.blocks


def _queries_before_keys(pooler: AttentivePooler) -> Tensor:
    """W_kᵀq of every attention head and query, [H·Q, D], softmax scale and the norm's scale included."""
    block = pooler.cross_attention_block
    attention = block.xattn
    keys = attention.kv.weight.chunk(2)[0]
    q = rearrange(attention.q(pooler.query_tokens[0]), "Q (H d) -> H Q d", H=attention.num_heads)
    k = rearrange(keys, "(H d) D -> H d D", H=attention.num_heads)
    return rearrange(
        einsum(q, k, "H Q d, H d D -> H Q D") * attention.head_dim**-0.5 * block.norm1.weight, "H Q D -> (H Q) D"
    )


def _after_attention(pooler: AttentivePooler, mixed: Tensor) -> Tensor:
    """What the block does after attention, from the weighted sums of normed tokens [B, H·Q, D] to [B, Q, D]."""
    block = pooler.cross_attention_block
    attention = block.xattn
    values = attention.kv.weight.chunk(2)[1]
    mixed = mixed * block.norm1.weight + block.norm1.bias
    mixed = rearrange(mixed, "B (H Q) D -> B H Q D", H=attention.num_heads)
    v = rearrange(values, "(H d) D -> H d D", H=attention.num_heads)
    y = rearrange(einsum(mixed, v, "B H Q D, H d D -> B H Q d"), "B H Q d -> B Q (H d)")
    if attention.kv.bias is not None:
        y = y + attention.kv.bias.chunk(2)[1]
    x = pooler.query_tokens + attention.proj(y)
    return x + block.mlp(block.norm2(x))
