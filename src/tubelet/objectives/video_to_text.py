"""Write a text about a video: a pooler turns its tokens into the prefix of a causal language model."""

from typing import Any

import torch
from torch import Tensor, nn

from tubelet.data import Batch
from tubelet.language.prefix_lm import PrefixLanguageModel
from tubelet.models.attentive_pooler import AttentivePooler
from tubelet.models.interfaces import Encoder
from tubelet.objectives.encoder_objective import EncoderObjective
from tubelet.objectives.losses.distributed import mean_over_processes
from tubelet.training.objective import StepRng


class RunningNorm(nn.Module):
    """Standardize each channel of [..., D] with a running mean and variance over all processes.

    The features of a frozen encoder may have a large mean that all videos share, which a layer norm keeps. As in batch
    normalization for linear probes (He et al. 2022, appendix A.1), but with the running statistics in training, too, so
    that a sample does not depend on the others.

    Args:
        dim: Width D.
        momentum: Least weight of a batch in the statistics, which are cumulative averages at first.
        eps: Added to the variance.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, dim: int, momentum: float = 0.01, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.update(x.detach())
        return (x - self.mean) * (self.variance + self.eps).rsqrt()

    @torch.no_grad()
    @torch.compiler.disable  # collectives
    def update(self, x: Tensor) -> None:
        """Take the rows of a batch into the statistics."""
        rows = x.flatten(0, -2).float()
        mean = mean_over_processes(rows.mean(0))
        variance = mean_over_processes((rows - mean).square().mean(0))
        self.batches += 1
        weight = (1 / self.batches).clamp_min(self.momentum)
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(variance, weight)


class Bridge(nn.Module):
    """Map tokens [B, N, D] of a video to the prefix [B, Q, D'] of a language model.

    Args:
        embed_dim: Width D.
        num_heads: Attention heads of the pooler.
        num_queries: Number Q of vectors.
        depth: Blocks of the pooler.
        out_dim: Width D'.
        init_std: Standard deviation of the pooler's initial weights.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, num_queries: int, depth: int, out_dim: int, init_std: float = 0.02
    ):
        super().__init__()
        self.norm = RunningNorm(embed_dim)
        self.pooler = AttentivePooler(num_queries, embed_dim, num_heads, depth=depth, init_std=init_std)
        self.out = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, out_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.pooler(self.norm(tokens)))


class LinearHead(nn.Module):
    """Map features of a language model [..., D] to logits or an embedding [..., D']: a norm and a linear layer."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, out_dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class VideoEncoding(EncoderObjective):
    """Base class of objectives of videos with texts: the encoder of the videos and what reads its tokens.

    A batch has the view `clip`, or the view `tokens` with features of a frozen encoder, and the targets of
    `tubelet.language.dataset.TextVideos`.

    Args:
        encoder: Maps clips [B, C, T, H, W] to tokens [B, N, D].
        bridge: Maps tokens to Q vectors [B, Q, D'].
        frozen: Do not train the encoder.
        blind: Read one token of zeros in place of those of the video: what can be told without seeing it. Then the
            encoder is not trained either.
        kwargs: Further arguments of `EncoderObjective`.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, bridge: Bridge, *, frozen: bool, blind: bool = False, **kwargs: Any):
        super().__init__(encoder, frozen=frozen or blind, **kwargs)
        self.bridge, self.blind = bridge, blind

    def prefix(self, batch: Batch) -> Tensor:
        """Return the vectors [B * n, Q, D'] of each video, once for each of its n texts."""
        return self.bridge(self.tokens(batch)).repeat_interleave(batch.tensor("target").shape[1], dim=0)

    def of_texts(self, batch: Batch, name: str) -> Tensor:
        """Return a target [B * n, …] of `TextVideos` for each text."""
        return batch.tensor(name).flatten(0, 1)

    def tokens(self, batch: Batch) -> Tensor:
        """Return the tokens [B, N, D] of the encoder, those of zeros [B, 1, D] where it is blind."""
        if self.blind:
            return torch.zeros(len(batch), 1, self.encoder.embed_dim, device=batch.tensor("target").device)
        if "tokens" in batch.views:
            return batch.views["tokens"]
        return self.encode(batch)

    def parts(self) -> dict[str, nn.Module]:
        """Return the trained modules, of a language model what a checkpoint stores; frozen ones are read anew."""
        return {n: m.stored() if isinstance(m, PrefixLanguageModel) else m for n, m in super().parts().items()}


class VideoToText(VideoEncoding):
    """Cross-entropy of the target's tokens, after the video and the prompt.

    Args:
        encoder: Maps clips [B, C, T, H, W] to tokens [B, N, D].
        bridge: Maps tokens to the prefix of the language model.
        language_model: Writes the text.
        kwargs: Further arguments of `VideoEncoding`.
    """

    def __init__(self, encoder: Encoder, bridge: Bridge, language_model: PrefixLanguageModel, **kwargs: Any):
        super().__init__(encoder, bridge, **kwargs)
        self.language_model = language_model

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        return {"loss": self.language_model.loss(self.prefix(batch), *self.text(batch))}

    def text(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return prompt, which of its tokens are no padding, and target."""
        return self.of_texts(batch, "prompt"), self.of_texts(batch, "prompt_used"), self.of_texts(batch, "target")
