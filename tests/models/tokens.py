"""Masks of tokens and models with random parameters, for tests of encoders."""

import torch


def random_masks(total, keep=17, batch=2, seed=2):
    """Indices of kept tokens [batch, keep] in random order, others for each clip."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(total, generator=generator)[:keep] for _ in range(batch)])


def take(features, indices):
    """The tokens of features [B, N, D] at the indices [B, K]."""
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


def randomised(model, std=0.1, seed=0):
    """Randomize all parameters including biases and norms, so that an omission changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model.eval()
