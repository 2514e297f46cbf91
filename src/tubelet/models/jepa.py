"""The joint-embedding predictive architecture: encoder, its moving average, predictor, loss (Bardes et al. 2024)."""

import copy
import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tubelet.config import Config
from tubelet.runtime.seeds import seed_for


class LossConfig(Config):
    """YAML section `loss`: the L_p prediction loss of V-JEPA, and terms that keep features from collapsing."""

    loss_exp: float = Field(1.0, gt=0)
    """p of the prediction loss mean(|prediction - target|^p) / p."""
    reg_coeff: float = Field(0.0, ge=0)
    """Weight of V-JEPA's hinge that holds the predictions' standard deviation over a clip's tokens above 1."""
    std_coeff: float = Field(0.0, ge=0)
    """Weight of the variance term of VICReg (Bardes et al. 2022, eq. 1) on the clips' mean context features."""
    std_floor: float = Field(0.5, gt=0)
    """Standard deviation across clips below which the variance term acts."""
    inv_coeff: float = Field(0.0, ge=0)
    """Weight of the invariance term of VICReg (eq. 5): a clip's mean context feature is the same under each mask."""
    cov_coeff: float = Field(0.0, ge=0)
    """Weight of the covariance term of VICReg (eq. 3) on the clips' mean context features."""


class JEPA(nn.Module):
    """Predicts an EMA encoder's features at hidden places from an encoder's features of the visible ones.

    It receives its parts: any encoder that accepts masks, and any predictor that maps
    `(context, target, masks_context, masks_target, mask_index)` to features at the masked places.
    """

    def __init__(self, encoder: nn.Module, predictor: nn.Module, loss: LossConfig):
        super().__init__()
        self.encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = predictor
        self.loss = loss
        self.train()

    def train(self, mode: bool = True) -> "JEPA":
        """As for any module, but the target encoder never drops anything out."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(
        self, clips: Tensor, masks_context: list[Tensor], masks_target: list[Tensor], seeds: list[int]
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            clips: normalised video [B, C, T, H, W].
            masks_context: for each mask, indices [B, Kc] of the tokens that the encoder sees.
            masks_target: for each mask, indices [B, Kt] of the tokens to predict.
            seeds: one for each clip; the noise of a diffusion predictor depends on nothing else.

        Returns:
            Scalars: `loss`, the sum to minimise, and its terms `loss_jepa`, `loss_reg`, `loss_std`, `loss_inv`,
            `loss_cov` (all but the first only where their coefficient is not zero).
        """
        targets = self.targets(clips, masks_target)
        contexts = self.encoder(clips, masks_context)
        predictions = []
        for index, (context, target) in enumerate(zip(contexts, targets, strict=True)):
            noise = self._noise(seeds, index, target)
            predictions.append(
                self.predictor(context, target, masks_context[index], masks_target[index], index, **noise)
            )
        return self.losses(predictions, targets, contexts)

    @torch.no_grad()
    def targets(self, clips: Tensor, masks_target: list[Tensor]) -> list[Tensor]:
        """Layer-normed features of the target encoder at the places of each mask [B, Kt, D]."""
        features = self.target_encoder(clips)
        features = F.layer_norm(features, features.shape[-1:])
        return [features.gather(1, mask.unsqueeze(-1).expand(-1, -1, features.shape[-1])) for mask in masks_target]

    def losses(self, predictions: list[Tensor], targets: list[Tensor], contexts: list[Tensor]) -> dict[str, Tensor]:
        """The loss and its terms, each averaged over the masks."""
        p = self.loss.loss_exp
        terms = {"loss_jepa": (1.0, _mean((z - h).abs().pow(p).mean() / p for z, h in _pairs(predictions, targets)))}
        if self.loss.reg_coeff > 0:
            terms["loss_reg"] = (self.loss.reg_coeff, prediction_variance_hinge(predictions))
        if self.loss.std_coeff > 0 or self.loss.cov_coeff > 0:
            clips = all_gather_with_grad(torch.stack([c.mean(1) for c in contexts], dim=1)).unbind(1)
        if self.loss.std_coeff > 0:
            hinge = _mean(variance_hinge(c, self.loss.std_floor) for c in clips)
            terms["loss_std"] = (self.loss.std_coeff, hinge)
        if self.loss.inv_coeff > 0:
            terms["loss_inv"] = (self.loss.inv_coeff, invariance([c.mean(1) for c in contexts]))
        if self.loss.cov_coeff > 0:
            terms["loss_cov"] = (self.loss.cov_coeff, _mean(covariance(c) for c in clips))
        loss = sum(coefficient * term for coefficient, term in terms.values())
        return {"loss": loss, **{name: term.detach() for name, (_, term) in terms.items()}}

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * encoder, in the parameters' own fp32."""
        ours, averages = ([_local_shard(p) for p in m.parameters()] for m in (self.encoder, self.target_encoder))
        torch._foreach_lerp_(averages, ours, 1.0 - momentum)

    def _noise(self, seeds: list[int], mask_index: int, target: Tensor) -> dict[str, Tensor]:
        """Noise and time steps of a diffusion predictor, drawn clip by clip; nothing for mask tokens."""
        if self.predictor.use_mask_tokens:
            return {}
        shape = (target.shape[1], self.predictor.predictor_embed_dim)
        noise, timestep = [], []
        for seed in seeds:
            generator = torch.Generator(target.device).manual_seed(seed_for(seed, mask_index))
            timestep.append(torch.randint(self.predictor.noise_steps, (), generator=generator, device=target.device))
            noise.append(torch.randn(shape, generator=generator, device=target.device))
        return {"noise": torch.stack(noise), "timestep": torch.stack(timestep)}


def all_gather_with_grad(features: Tensor) -> Tensor:
    """The features [B, …] of every process's clips, [processes · B, …].

    Each process computes the same term from them, and gradients are averaged over the processes afterwards: its own
    rows' gradients are scaled so that the mean is the gradient of that one term.
    """
    if not dist.is_initialized():
        return features
    count, own = dist.get_world_size(), features.detach()
    gathered = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(gathered, own.contiguous())
    gathered[dist.get_rank()] = own + count * (features - own)
    return torch.cat(gathered)


def prediction_variance_hinge(predictions: list[Tensor]) -> Tensor:
    """V-JEPA's regulariser: mean hinge below 1 of the predictions' standard deviation over tokens [B, K, D]."""
    deviation = _mean((z.float().var(dim=1) + 1e-4).sqrt() for z in predictions)
    return F.relu(1.0 - deviation).mean()


def variance_hinge(features: Tensor, floor: float) -> Tensor:
    """Mean over D of how far the standard deviation over the clips of `features` [B, D] is below `floor`."""
    return F.relu(floor - (features.float().var(dim=0) + 1e-4).sqrt()).mean()


def invariance(views: list[Tensor]) -> Tensor:
    """Mean squared difference between each two of the `views` [B, D] of the same clips."""
    return _mean((a.float() - b.float()).square().mean() for a, b in itertools.combinations(views, 2))


def covariance(features: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances of `features` [B, D], divided by D."""
    centred = features.float() - features.float().mean(0)
    cov = centred.T @ centred / (len(features) - 1)
    return (cov.square().sum() - cov.diagonal().square().sum()) / len(cov)


def _local_shard(parameter: Tensor) -> Tensor:
    """The part of a sharded parameter that this process holds; a whole one as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _pairs(first: list[Tensor], second: list[Tensor]) -> zip:
    return zip(first, second, strict=True)


def _mean(terms) -> Tensor:
    return torch.stack(list(terms)).mean(0)
